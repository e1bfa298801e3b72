#include "core/kernels.hpp"

#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

namespace toprovar {

namespace {

constexpr int32_t kSHARED_WITHOUT_ASKING = 48 << 10;
constexpr int64_t kMAX_GRID[3] = {2147483647, 65535, 65535};

struct Loaded {
    std::mutex mutex;
    std::map<std::pair<unsigned long long, KernelEntry const*>, Kernel> kernels;
};

Loaded& loaded() {
    // Never destroyed: engines may outlive the destructors of static objects.
    static Loaded* const all = new Loaded;
    return *all;
}

}  // namespace

Status Device::current(Device& device) noexcept {
    Status status;
    Driver const* driver = Driver::get(status);
    if (driver == nullptr) {
        return status;
    }
    CUcontext context = nullptr;
    if (!(status = driver->check(driver->cuCtxGetCurrent(&context), "cuCtxGetCurrent")).ok()) {
        return status;
    }
    if (context == nullptr) {
        return Status::error("no CUDA context is current in this thread; call cudaSetDevice before TensorRT");
    }
    CUdevice handle = 0;
    if (!(status = driver->check(driver->cuCtxGetDevice(&handle), "cuCtxGetDevice")).ok() ||
        !(status = driver->check(driver->cuCtxGetId(context, &device.contextId), "cuCtxGetId")).ok()) {
        return status;
    }
    int values[3] = {};
    CUdevice_attribute const attributes[3] = {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                              CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                                              CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT};
    for (int i = 0; i < 3; ++i) {
        CUresult const code = driver->cuDeviceGetAttribute(&values[i], attributes[i], handle);
        if (!(status = driver->check(code, "cuDeviceGetAttribute")).ok()) {
            return status;
        }
    }
    device.capability = 10 * values[0] + values[1];
    device.smCount = values[2];
    return {};
}

int32_t bestArch(KernelTable const& table, int32_t capability) noexcept {
    int32_t best = 0;
    for (int32_t i = 0; i < table.nbEntries; ++i) {
        int32_t const arch = table.entries[i].arch;
        if (runsOn(arch, capability) && arch > best) {
            best = arch;
        }
    }
    return best;
}

void describeArchs(KernelTable const& table, char* text, size_t size) noexcept {
    text[0] = '\0';
    size_t used = 0;
    for (int32_t i = 0; i < table.nbEntries; ++i) {
        bool known = false;
        for (int32_t j = 0; j < i && !known; ++j) {
            known = table.entries[j].arch == table.entries[i].arch;
        }
        if (known) {
            continue;
        }
        int const written =
            std::snprintf(text + used, size - used, "%ssm_%d", used > 0 ? ", " : "", table.entries[i].arch);
        if (written < 0 || used + static_cast<size_t>(written) >= size) {
            return;
        }
        used += static_cast<size_t>(written);
    }
}

Status loadKernel(Device const& device, KernelEntry const& entry, Kernel& kernel) {
    Status status;
    Driver const* driver = Driver::get(status);
    if (driver == nullptr) {
        return status;
    }
    Loaded& all = loaded();
    std::lock_guard<std::mutex> const lock(all.mutex);
    auto const key = std::make_pair(device.contextId, &entry);
    auto const found = all.kernels.find(key);
    if (found != all.kernels.end()) {
        kernel = found->second;
        return {};
    }
    Kernel fresh;
    fresh.entry = &entry;
    CUmodule module = nullptr;
    if (!(status = driver->check(driver->cuModuleLoadData(&module, entry.image), entry.name)).ok()) {
        return status;
    }
    struct Wanted {
        char const* symbol;
        int32_t sharedBytes;
        CUfunction* function;
    };
    Wanted const wanted[] = {{entry.symbol, entry.sharedBytes, &fresh.function},
                             {entry.finishSymbol, 0, &fresh.finish},
                             {entry.smallSymbol, entry.hopper.smallSharedBytes, &fresh.small}};
    for (Wanted const& one : wanted) {
        if (one.symbol[0] == '\0') {
            continue;
        }
        status = driver->check(driver->cuModuleGetFunction(one.function, module, one.symbol), entry.name);
        if (status.ok() && one.sharedBytes > kSHARED_WITHOUT_ASKING) {
            CUresult const code = driver->cuFuncSetAttribute(
                *one.function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, one.sharedBytes);
            status = driver->check(code, entry.name);
        }
        if (!status.ok()) {
            return status;
        }
    }
    all.kernels.emplace(key, fresh);
    kernel = fresh;
    return {};
}

Status launchKernel(Kernel const& kernel, int64_t const (&sizes)[3], void** parameters, CUstream stream) noexcept {
    Status status;
    Driver const* driver = Driver::get(status);
    if (driver == nullptr) {
        return status;
    }
    unsigned grid[3];
    for (int i = 0; i < 3; ++i) {
        int64_t const programs = ceilDivide(sizes[i], kernel.entry->perProgram[i]);
        if (programs < 1 || programs > kMAX_GRID[i]) {
            return Status::error("%s: a grid of %lld along axis %d; valid are 1 to %lld: use a smaller batch",
                                 kernel.entry->name, static_cast<long long>(programs), i,
                                 static_cast<long long>(kMAX_GRID[i]));
        }
        grid[i] = static_cast<unsigned>(programs);
    }
    CUresult const code =
        driver->cuLaunchKernel(kernel.function, grid[0], grid[1], grid[2], static_cast<unsigned>(kernel.entry->threads),
                               1, 1, static_cast<unsigned>(kernel.entry->sharedBytes), stream, parameters, nullptr);
    return driver->check(code, kernel.entry->name);
}

}  // namespace toprovar
