// Rows of a table, whatever their type: copied as bytes.
#include "../simd.hpp"

// y [count][row_bytes] gets the rows `ids` of a table [rows][row_bytes].
EXPORT(int, embedding)(const char* table, const int64_t* ids, char* y, int64_t rows, int64_t row_bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return BAD_ROW;
    share(count, 8, count * row_bytes > 1 << 20, [&](int64_t i) {
        memcpy(y + i * row_bytes, table + ids[i] * row_bytes, size_t(row_bytes));
    });
    return OK;
}
