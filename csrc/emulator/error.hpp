#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace dsv3::emulator {

/// Each kind becomes one Python exception class.
enum class ErrorKind {
    Emulation,     ///< malformed PTX, bad launch arguments, trap
    Deadlock,      ///< nothing can move
    Hazard,        ///< the program is wrong on some schedule, whatever this one gave
    MemoryAccess,  ///< out of bounds, misaligned, freed, wrong state space
    Unsupported,   ///< an instruction this machine does not execute; found at load
};

/// Where an error happened; fields that do not apply are negative or empty.
struct Place {
    std::string kernel;
    int64_t block[3] = {-1, -1, -1};
    int rank = -1;
    int warp = -1;
    int lane = -1;
    int ptx_line = -1;
    std::string source;  ///< "file.cu:12"
};

class Error : public std::exception {
  public:
    Error(ErrorKind kind, std::string message, Place place = {})
        : kind(kind), message(std::move(message)), place(std::move(place)) {}
    const char* what() const noexcept override { return message.c_str(); }

    ErrorKind kind;
    std::string message;
    Place place;
};

}  // namespace dsv3::emulator
