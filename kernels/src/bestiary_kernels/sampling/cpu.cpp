// The best token of each row, and one drawn for each. For a draw the smallest score that top-k and top-p keep is found
// without sorting the row: scores are counted and weighed in bins below the best, and only the bins that the limits
// fall into are sorted.
#include "../simd.hpp"

namespace {

// Bins of an eighth, down to 32 below the best, where a weight is e^-32; all that is less falls into the last.
constexpr int BINS = 257;
constexpr float BINS_PER_UNIT = 8.0f;

struct Limits {
    int64_t most;       // top-k, or the vocabulary
    double part;        // top-p
    float min_p_floor;  // a score below it does not count
};

struct Bins {
    int64_t counts[BINS];
    double masses[BINS];
};

inline int bin_of(float score, float best) {
    const float below = (best - score) * BINS_PER_UNIT;
    return below < float(BINS - 1) ? int(below) : BINS - 1;
}

// Falling order. Shell's sort: what is sorted is short, and no template of the standard library may be used here.
void sort_falling(float* values, int64_t n) {
    int64_t gap = 1;
    while (gap < n / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (int64_t i = gap; i < n; ++i) {
            const float value = values[i];
            int64_t j = i;
            for (; j >= gap && values[j - gap] < value; j -= gap) values[j] = values[j - gap];
            values[j] = value;
        }
}

inline double weight_of(float score, float best) { return exp_of(splat(score - best))[0]; }

// The scores of one bin, best first.
int64_t gather_bin(const float* scores, int64_t n, float best, float floor, int bin, float* found) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i)
        if (scores[i] >= floor && bin_of(scores[i], best) == bin) found[count++] = scores[i];
    sort_falling(found, count);
    return count;
}

// The smallest score that the limits keep. `found` has room for a row.
float nucleus_floor(const float* scores, int64_t n, float best, const Limits& limits, float* found) {
    Bins bins;
    memset(&bins, 0, sizeof bins);
    double everything = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (!(scores[i] >= limits.min_p_floor)) continue;
        const int bin = bin_of(scores[i], best);
        bins.counts[bin] += 1;
    }
    over_vectors(n, [&](int64_t i, int used) {
        const Floats weights = exp_of(load_up_to(scores + i, used) - best);
        for (int lane = 0; lane < used; ++lane)
            if (scores[i + lane] >= limits.min_p_floor) bins.masses[bin_of(scores[i + lane], best)] += weights[lane];
    });
    for (int bin = 0; bin < BINS; ++bin) everything += bins.masses[bin];
    // The k-th best score, and the weight of the k best.
    float last = -__builtin_inff();
    double total = everything;
    int64_t seen = 0;
    double mass = 0;
    for (int bin = 0; bin < BINS; ++bin) {
        if (seen + bins.counts[bin] >= limits.most) {
            gather_bin(scores, n, best, limits.min_p_floor, bin, found);
            for (int64_t i = 0; seen + i < limits.most; ++i) mass += weight_of(last = found[i], best);
            total = mass;
            break;
        }
        seen += bins.counts[bin];
        mass += bins.masses[bin];
    }
    if (limits.part >= 1) return last;
    // The score at which the weights, the best first, reach the part.
    const double wanted = limits.part * total;
    mass = 0;
    for (int bin = 0; bin < BINS; ++bin) {
        if (mass + bins.masses[bin] >= wanted && bins.counts[bin]) {
            const int64_t count = gather_bin(scores, n, best, limits.min_p_floor, bin, found);
            float at = found[0];
            for (int64_t i = 0; i < count && (i == 0 || mass < wanted); ++i) mass += weight_of(at = found[i], best);
            return at > last ? at : last;
        }
        mass += bins.masses[bin];
    }
    return last;
}

// Sums of weights, in steps of whole vectors and then of single ones, so that a sum never depends on the lanes.
int64_t invert(const float* scores, int64_t n, float best, float floor, double uniform, float* weights) {
    double total = 0;
    over_vectors(n, [&](int64_t i, int used) {
        const Floats score = load_up_to(scores + i, used);
        const Floats weight = exp_of(score - best);
        store_up_to(weights + i, score >= floor ? weight : Floats{}, used);
    });
    for (int64_t i = 0; i < n; ++i) total += weights[i];
    const double target = uniform * total;
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] == 0.0f) continue;
        sum += weights[i];
        last = i;
        if (sum > target) return i;
    }
    return last;
}

// A stretch of a row that one thread reads at a time.
constexpr int64_t STRETCH = 8192;

// The largest of n scores; NaN where any is. Four at a time, or each would wait for the one before.
template <class T> float largest_in(const T* scores, int64_t n) {
    constexpr int CHAINS = 4;
    Floats top[CHAINS];
    Ints strange[CHAINS] = {};
    for (Floats& one : top) one = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + CHAINS * W <= n; i += CHAINS * W)
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Floats score = load(scores + i + chain * W);
            strange[chain] |= score != score;
            top[chain] = larger(score, top[chain]);
        }
    float best = -__builtin_inff();
    for (; i < n; ++i) {
        const float score = to_float(scores[i]);
        if (score != score) return score;
        best = score > best ? score : best;
    }
    for (int chain = 0; chain < CHAINS; ++chain) {
        for (int lane = 0; lane < W; ++lane)
            if (strange[chain][lane]) return __builtin_nanf("");
        const float other = largest_of(top[chain]);
        best = other > best ? other : best;
    }
    return best;
}

template <class T>
int find_best(const T* logits, int64_t* tokens, int64_t rows, int64_t vocabulary, int64_t stride) {
    const int64_t stretches = (vocabulary + STRETCH - 1) / STRETCH;
    float* const found = (float*)scratch(size_t(rows * stretches) * sizeof(float));
    if (!found && rows) return NO_MEMORY;
    share(rows * stretches, 1, rows * vocabulary > 2 * STRETCH, [&](int64_t item) {
        const int64_t first = item % stretches * STRETCH;
        found[item] = largest_in(logits + item / stretches * stride + first, smaller(STRETCH, vocabulary - first));
    });
    for (int64_t r = 0; r < rows; ++r) {
        const float* const row = found + r * stretches;
        int64_t best = 0;
        for (int64_t i = 1; i < stretches && row[best] == row[best]; ++i)
            if (!(row[i] <= row[best])) best = i;
        tokens[r] = -1;
        if (!__builtin_isfinite(row[best])) continue;
        int64_t place = best * STRETCH;
        while (to_float(logits[r * stride + place]) != row[best]) ++place;
        tokens[r] = place;
    }
    return OK;
}

}  // namespace

// `stride` from one row to the next, rows themselves dense.
EXPORT(int, greedy)(int is_bf16, const void* logits, int64_t* tokens, int64_t rows, int64_t vocabulary,
                    int64_t stride) {
    return is_bf16 ? find_best((const bf16*)logits, tokens, rows, vocabulary, stride)
                   : find_best((const float*)logits, tokens, rows, vocabulary, stride);
}

EXPORT(int, draw)(const float* logits, const float* temperatures, const int32_t* top_ks, const float* top_ps,
                  const float* min_ps, const double* uniforms, int64_t* tokens, int64_t rows, int64_t vocabulary,
                  int64_t stride) {
    int failed = OK;
    share(rows, 1, rows * vocabulary > 16384, [&](int64_t r) {
        float* const scores = (float*)scratch(size_t(2 * vocabulary + W) * sizeof(float));
        if (!scores) {
            failed = NO_MEMORY;
            return;
        }
        float* const found = scores + vocabulary;
        const float* const row = logits + r * stride;
        Floats top = splat(-__builtin_inff());
        over_vectors(vocabulary, [&](int64_t i, int used) {
            const Floats score = load_up_to(row + i, used) / temperatures[r];
            store_up_to(scores + i, score, used);
            if (used == W) top = larger(score, top);
            else
                for (int lane = 0; lane < used; ++lane) top[lane] = score[lane] > top[lane] ? score[lane] : top[lane];
        });
        const float best = largest_of(top);
        float floor = min_ps[r] > 0 ? best + logf(min_ps[r]) : -__builtin_inff();
        if (top_ks[r] > 0 || top_ps[r] < 1) {
            const int64_t most = top_ks[r] > 0 ? smaller<int64_t>(top_ks[r], vocabulary) : vocabulary;
            const float nucleus = nucleus_floor(scores, vocabulary, best, {most, top_ps[r], floor}, found);
            floor = nucleus > floor ? nucleus : floor;
        }
        tokens[r] = invert(scores, vocabulary, best, floor, uniforms[r], found);
    });
    return failed;
}
