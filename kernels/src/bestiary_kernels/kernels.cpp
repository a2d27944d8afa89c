// One instruction set's copy of every operation; setup.py compiles this file once per variant with -DVARIANT=name.
#include "activation/cpu.cpp"
#include "attention/cpu.cpp"
#include "embedding/cpu.cpp"
#include "linear/cpu.cpp"
#include "measure.cpp"
#include "norm/cpu.cpp"
#include "rotary/cpu.cpp"
#include "tape.cpp"
