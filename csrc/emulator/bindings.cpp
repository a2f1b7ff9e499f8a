#include <pybind11/pybind11.h>

namespace dsv3 {
void bind_leaves(pybind11::module_& m);  // bindings_leaves.cpp
}

PYBIND11_MODULE(_emulator, m) {
    m.doc() = "The PTX machine.";
    dsv3::bind_leaves(m);
}
