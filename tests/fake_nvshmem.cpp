// A stand-in for libnvshmem_host.so.3: what dsv3_kernels.nvshmem calls, on host memory, failing as the
// environment says. It checks versions and layouts as the library would, with numbers of its own headers.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include <unistd.h>

namespace {

long number(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atol(text) : otherwise;
}

int version_of(const void* structure) { return *static_cast<const int*>(structure); }

struct UniqueIdArguments {
    int version;
    void* id;
    int rank, size;
};
struct Attributes {
    int version;
    void* mpi;
    struct {
        int version;
        UniqueIdArguments unique_id;
        char rest[96];
    } arguments;
};
static_assert(sizeof(Attributes) == 144, "as in device_host/nvshmem_types.h");

int rank = -1, size = -1, worlds = 0;
long taken = 0;
int pairs[1024];
std::string heard;

}  // namespace

extern "C" {

void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch) {
    const long version = number("FAKE_VERSION", 30800);
    *major = version / 10000, *minor = version / 100 % 100, *patch = version % 100;
}

int nvshmemx_get_uniqueid(char* id) {
    if (version_of(id) != (1 << 16) + 128) return 1;
    if (number("FAKE_NO_INTERFACE", 0)) return 5;
    std::memset(id + 4, 0x5a, 124);
    return 0;
}

int nvshmemx_set_attr_uniqueid_args(int my_rank, int ranks, char* id, Attributes* attributes) {
    if (attributes->version != (1 << 16) + 144 || attributes->arguments.version != (1 << 16) + 128) return 1;
    if (attributes->arguments.unique_id.version != (1 << 16) + 24) return 2;
    for (int i = 4; i < 128; ++i)
        if (id[i] != 0x5a) return 3;
    attributes->arguments.unique_id.id = id;
    attributes->arguments.unique_id.rank = my_rank;
    attributes->arguments.unique_id.size = ranks;
    return 0;
}

int nvshmemx_hostlib_init_attr(unsigned flags, Attributes* attributes) {
    if (flags != 8 || number("FAKE_INIT", 0)) return 7;
    sleep(number("FAKE_HANG", 0));  // as for ranks that never come
    heard.clear();
    for (const char* name : {"NVSHMEM_IB_ENABLE_IBGDA", "NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_SYMMETRIC_SIZE"}) {
        const char* text = std::getenv(name);
        heard += std::string(name) + "=" + (text ? text : "") + ";";
    }
    rank = attributes->arguments.unique_id.rank;
    size = number("FAKE_SIZE", attributes->arguments.unique_id.size);
    ++worlds;
    return 0;
}

void nvshmemx_hostlib_finalize() { rank = size = -1; }
int nvshmem_my_pe() { return rank; }
int nvshmem_n_pes() { return size; }

void* nvshmem_calloc(size_t count, size_t bytes) {
    const long heap = std::atol(std::getenv("NVSHMEM_SYMMETRIC_SIZE"));
    if (taken + static_cast<long>(count * bytes) > heap) return nullptr;
    taken += count * bytes;
    return std::calloc(count, bytes);
}

void* nvshmem_ptr(void* memory, int peer) {
    const long node = number("FAKE_NODE", 8);
    return peer / node == rank / node ? static_cast<char*>(memory) + 65536 * (peer - rank) : nullptr;
}

int nvshmemx_qp_create(int count, int** array) {
    const long most = number("FAKE_QUEUE_PAIRS", 1024);
    for (int i = 0; i < count; ++i) pairs[i] = i < most ? 2 + i : 1;
    *array = pairs;
    return number("FAKE_QP_STATUS", 0);
}

int nvshmemx_culibrary_init(void* library) { return library == reinterpret_cast<void*>(0x1234) ? 0 : 9; }

int fake_worlds() { return worlds; }
const char* fake_environment() { return heard.c_str(); }
}
