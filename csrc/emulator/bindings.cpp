#include <pybind11/pybind11.h>

PYBIND11_MODULE(_emulator, m) { m.doc() = "The PTX machine."; }
