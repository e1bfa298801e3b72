#include "tensorrt_target.hpp"

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <set>
#include <vector>

#include "cuda.hpp"
#include "error.hpp"

namespace toprovar::runtime {

namespace {

namespace nv = nvinfer1;
namespace fs = std::filesystem;

#if NV_TENSORRT_MAJOR == 8
constexpr char const* kPLUGIN_LIBRARY = "libtoprovar_plugins86.so";
#else
constexpr char const* kPLUGIN_LIBRARY = "libtoprovar_plugins.so";
#endif
constexpr char const* kGRAPHS[] = {"prefix", "step", "advance", "decoder"};

class Logger final : public nv::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "TensorRT: %s\n", message);
        }
    }
};

// libnvinfer, of the major version that this was compiled for.
struct Library {
    void* handle = nullptr;
    int32_t (*version)() noexcept = nullptr;
    void* (*createRuntime)(void*, int32_t) noexcept = nullptr;

    Library() {
        std::string const name = text("libnvinfer.so.", NV_TENSORRT_MAJOR);
        handle = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (handle == nullptr) {
            throw Error(text("TensorRT is not found: ", dlerror(), "; set LD_LIBRARY_PATH to the folder of ", name));
        }
        version = reinterpret_cast<decltype(version)>(dlsym(handle, "getInferLibVersion"));
        createRuntime = reinterpret_cast<decltype(createRuntime)>(dlsym(handle, "createInferRuntime_INTERNAL"));
        if (version == nullptr || createRuntime == nullptr) {
            throw Error(text(name, " is no TensorRT: it has no createInferRuntime_INTERNAL; install TensorRT again"));
        }
    }

    // Such as 10.16.1.
    std::string versionText() const {
        int32_t const number = version();
        bool const ten = NV_TENSORRT_MAJOR >= 10;  // the number has two digits more for minor and patch since 10
        int32_t const major = ten ? number / 10000 : number / 1000;
        int32_t const minor = ten ? number / 100 % 100 : number / 100 % 10;
        return text(major, ".", minor, ".", number % 100);
    }
};

// "10.16.1.11" -> "10.16.1"
std::string threeParts(std::string const& version) {
    size_t end = 0;
    for (int dots = 0; end < version.size(); ++end) {
        if (version[end] == '.' && ++dots == 3) {
            break;
        }
    }
    return version.substr(0, end);
}

DType dtypeOfTensor(nv::DataType type, std::string const& name) {
    switch (type) {
        case nv::DataType::kFLOAT:
            return DType::kFLOAT32;
        case nv::DataType::kHALF:
            return DType::kFLOAT16;
        case nv::DataType::kINT32:
            return DType::kINT32;
        case nv::DataType::kBOOL:
            return DType::kBOOL;
#if NV_TENSORRT_MAJOR >= 10
        case nv::DataType::kINT64:
            return DType::kINT64;
        case nv::DataType::kBF16:
            return DType::kBFLOAT16;
#endif
        default:
            throw Error(text("tensor ", name, " of an engine has type ", static_cast<int>(type),
                             ", which no bundle has; export the bundle again"));
    }
}

nv::Dims dimsOf(Shape const& shape) {
    nv::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
        dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[i]);
    }
    return dims;
}

// An engine file in memory for as long as it is deserialised.
class Mapped {
public:
    explicit Mapped(fs::path const& path) : size_(fs::file_size(path)) {
        int const file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        data_ = file < 0 ? MAP_FAILED : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        if (file >= 0) {
            close(file);
        }
        if (data_ == MAP_FAILED) {
            throw Error(text(path.string(), ": cannot be read; check that it may be read"));
        }
    }
    ~Mapped() { munmap(data_, size_); }
    Mapped(Mapped const&) = delete;
    Mapped& operator=(Mapped const&) = delete;

    void const* data() const noexcept { return data_; }
    size_t size() const noexcept { return size_; }

private:
    size_t size_;
    void* data_ = nullptr;
};

class TensorRt final : public Target {
public:
    TensorRt(Bundle const& bundle, int64_t batch, TensorRtOptions const& options)
        : cuda_(Cuda::get()), cudaGraphs_(options.cudaGraphs), device_(options.device) {
        cuda_.check(cuda_.cuDeviceGet(&handle_, device_), "opening the GPU");
        cuda_.check(cuda_.cuDevicePrimaryCtxRetain(&context_, handle_), "starting the GPU");
        cuda_.check(cuda_.cuCtxSetCurrent(context_), "starting the GPU");
        cuda_.check(cuda_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "making a stream");
        check(bundle, batch);
        runtime_.reset(static_cast<nv::IRuntime*>(library_.createRuntime(&logger_, NV_TENSORRT_VERSION)));
        if (runtime_ == nullptr) {
            throw Error("TensorRT does not start; its messages above say why");
        }
        loadPlugins(options.plugins);
        size_t scratch = 0;
        for (char const* graph : kGRAPHS) {
            scratch = std::max(scratch, load(bundle, graph));
        }
        // Engines run one behind the other on one stream, so all contexts share their working memory.
        scratch_ = allocate(std::max<size_t>(scratch, 1));
        scratchBytes_ = scratch;
    }

    ~TensorRt() override {
        cuda_.cuStreamSynchronize(stream_);
        for (CUgraphExec graph : captured_) {
            cuda_.cuGraphExecDestroy(graph);
        }
        contexts_.clear();
        graphs_.clear();
        runtime_.reset();
        for (CUdeviceptr memory : allocated_) {
            cuda_.cuMemFree(memory);
        }
        if (staging_ != nullptr) {
            cuda_.cuMemFreeHost(staging_);
        }
        cuda_.cuStreamDestroy(stream_);
        cuda_.cuDevicePrimaryCtxRelease(handle_);
    }

    TensorRt(TensorRt const&) = delete;
    TensorRt& operator=(TensorRt const&) = delete;

    std::string description() const override {
        int driver = 0;
        cuda_.cuDriverGetVersion(&driver);
        return text("tensorrt ", library_.versionText(), " ", gpu_, ", CUDA driver ", driver / 1000, ".",
                    driver % 1000 / 10, cudaGraphs_ ? ", CUDA graphs" : "");
    }

    Run bind(std::string const& graph, Buffers const& inputs, Buffers const& outputs) override {
        Graph& stages = graphs_.at(graph);
        checkNames(graph, stages, inputs, outputs);
        Buffers buffers = inputs;
        buffers.insert(outputs.begin(), outputs.end());
        std::vector<nv::IExecutionContext*> contexts;
        for (Stage const& stage : stages.stages) {
            contexts.push_back(&bindStage(stage, stages.between, buffers));
        }
        auto const enqueue = [this, contexts, graph] {
            for (nv::IExecutionContext* context : contexts) {
                if (!context->enqueueV3(reinterpret_cast<cudaStream_t>(stream_))) {
                    throw Error(text("engine ", graph, " failed to run; TensorRT's messages above say why"));
                }
            }
        };
        enqueue();  // what TensorRT does once for new shapes must not be captured
        synchronize();
        if (!cudaGraphs_) {
            return enqueue;
        }
        cuda_.check(cuda_.cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "capturing a CUDA graph");
        bool failed = false;
        try {
            enqueue();
        } catch (Error const&) {
            failed = true;  // the capture has to be ended all the same
        }
        CUgraph captured = nullptr;
        CUresult const code = cuda_.cuStreamEndCapture(stream_, &captured);
        if (failed || code != CUDA_SUCCESS) {
            throw Error(text("engine ", graph, " cannot be captured in a CUDA graph; use --no-cuda-graphs"));
        }
        CUgraphExec executable = nullptr;
        CUresult const instantiated = cuda_.cuGraphInstantiateWithFlags(&executable, captured, 0);
        cuda_.cuGraphDestroy(captured);
        cuda_.check(instantiated, "making a CUDA graph");
        captured_.push_back(executable);
        return [this, executable] { cuda_.check(cuda_.cuGraphLaunch(executable, stream_), "running a CUDA graph"); };
    }

    uint64_t allocate(size_t sizeBytes) override {
        CUdeviceptr memory = 0;
        cuda_.check(cuda_.cuMemAlloc(&memory, sizeBytes), "allocating GPU memory");
        allocated_.push_back(memory);
        cuda_.check(cuda_.cuMemsetD8Async(memory, 0, sizeBytes, stream_), "clearing GPU memory");
        return memory;
    }

    void write(Buffer const& buffer, void const* values) override {
        cuda_.check(cuda_.cuMemcpyHtoDAsync(buffer.begin(), values, buffer.sizeBytes(), stream_), "copying to the GPU");
        auto const* const from = static_cast<char const*>(values);
        auto const* const staged = static_cast<char const*>(staging_);
        if (std::less<>()(from, staged) || !std::less<>()(from, staged + stagingBytes_)) {
            synchronize();  // the caller may free it
        }
    }

    void read(Buffer const& buffer, void* values) override {
        cuda_.check(cuda_.cuMemcpyDtoHAsync(values, buffer.begin(), buffer.sizeBytes(), stream_),
                    "copying from the GPU");
        synchronize();
    }

    void synchronize() override { cuda_.check(cuda_.cuStreamSynchronize(stream_), "running on the GPU"); }

    void* staging(size_t sizeBytes) override {
        if (sizeBytes > stagingBytes_) {
            synchronize();
            if (staging_ != nullptr) {
                cuda_.check(cuda_.cuMemFreeHost(staging_), "freeing pinned memory");
            }
            staging_ = nullptr;
            cuda_.check(cuda_.cuMemHostAlloc(&staging_, sizeBytes, 0), "allocating pinned memory");
            stagingBytes_ = sizeBytes;
        }
        return staging_;
    }

private:
    struct Stage {
        std::string name;  // among the engines of the manifest
        std::unique_ptr<nv::ICudaEngine> engine;
    };
    struct Graph {
        std::vector<Stage> stages;
        Buffers between;  // what one stage leaves to a later one
    };

    // Whether the engines of a bundle are for what is here.
    void check(Bundle const& bundle, int64_t batch) {
        char name[256] = {};
        cuda_.check(cuda_.cuDeviceGetName(name, sizeof(name), handle_), "asking for the GPU's name");
        gpu_ = name;
        int major = 0;
        int minor = 0;
        cuda_.check(cuda_.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle_),
                    "asking for the GPU's architecture");
        cuda_.check(cuda_.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle_),
                    "asking for the GPU's architecture");
        std::string const capability = text(major, ".", minor);
        std::string const root = bundle.root().string();
        auto const found = bundle.manifest().targets.find("tensorrt");
        if (found == bundle.manifest().targets.end()) {
            throw Error(text(root, ": has no engines for TensorRT; export it with --target tensorrt on this machine"));
        }
        TargetInfo const& target = found->second;
        struct Check {
            char const* what;
            std::string built;
            std::string here;
        };
        Check const checks[] = {{"TensorRT", threeParts(target.version), library_.versionText()},
                                {"GPU", target.gpu, gpu_},
                                {"compute capability", target.computeCapability, capability}};
        for (Check const& one : checks) {
            if (!one.built.empty() && one.built != one.here) {
                throw Error(text(root, ": its engines were built for ", one.what, " ", one.built, ", here is ",
                                 one.here, "; export it with --target tensorrt on this machine"));
            }
        }
        if (target.batch && *target.batch != batch) {
            throw Error(text(root, ": its engines were built for batches of ", *target.batch, ", asked for is ", batch,
                             "; use --batch ", *target.batch, ", or export it again"));
        }
    }

    void loadPlugins(fs::path path) {
        if (path.empty()) {
            char const* const given = std::getenv("TOPROVAR_PLUGIN_LIBRARY");
            std::error_code failed;
            path = given != nullptr ? fs::path(given)
                                    : fs::read_symlink("/proc/self/exe", failed).parent_path() / kPLUGIN_LIBRARY;
        }
        std::error_code failed;
        if (!fs::is_regular_file(path, failed)) {
            throw Error(text("the plugin library is not at ", path.string(),
                             "; build it (cmake --build build) and name it with --plugins or TOPROVAR_PLUGIN_LIBRARY"));
        }
        if (runtime_->getPluginRegistry().loadLibrary(path.c_str()) == nullptr) {
            throw Error(text("TensorRT ", library_.versionText(), " refuses the plugin library ", path.string(),
                             "; build it with the headers of this version"));
        }
    }

    // The engines of a graph in the order in which they run: "step", and where it was cut "step.1", "step.2", ...
    // Returns bytes of working memory.
    size_t load(Bundle const& bundle, std::string const& graph) {
        auto const& files = bundle.manifest().targets.at("tensorrt").engines;
        Graph& loaded = graphs_[graph];
        size_t scratch = 0;
        auto file = files.find(graph);
        if (file == files.end()) {
            throw Error(text(bundle.root().string(), ": has no TensorRT engine of ", graph, "; export it again"));
        }
        for (; file != files.end(); file = files.find(text(graph, ".", loaded.stages.size()))) {
            Mapped const plan(bundle.path(file->second));
            std::unique_ptr<nv::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
            if (engine == nullptr) {
                throw Error(text(bundle.path(file->second).string(),
                                 ": TensorRT refuses the engine, its messages above say why; export the bundle again"));
            }
#if NV_TENSORRT_MAJOR >= 10
            scratch = std::max(scratch, static_cast<size_t>(engine->getDeviceMemorySizeV2()));
#else
            scratch = std::max(scratch, engine->getDeviceMemorySize());
#endif
            loaded.stages.push_back({file->first, std::move(engine)});
        }
        allocateBetween(loaded);
        return scratch;
    }

    // Memory of what one stage leaves to a later one, for its largest profile: scales run one behind the other, so they
    // share it.
    void allocateBetween(Graph& graph) {
        std::map<std::string, size_t> sizes;
        std::set<std::string> made;
        for (Stage const& stage : graph.stages) {
            for (std::string const& name : tensorsOf(*stage.engine, nv::TensorIOMode::kINPUT)) {
                if (made.count(name) == 0) {
                    continue;
                }
                DType const type = dtypeOfTensor(stage.engine->getTensorDataType(name.c_str()), name);
                for (int32_t profile = 0; profile < stage.engine->getNbOptimizationProfiles(); ++profile) {
                    nv::Dims const most = limitOf(*stage.engine, name, profile, nv::OptProfileSelector::kMAX);
                    auto const count = static_cast<size_t>(volume(Shape(most.d, most.d + most.nbDims)));
                    sizes[name] = std::max({sizes[name], size_t{1}, count * sizeOf(type)});
                }
            }
            auto const outputs = tensorsOf(*stage.engine, nv::TensorIOMode::kOUTPUT);
            made.insert(outputs.begin(), outputs.end());
        }
        for (auto const& [name, size] : sizes) {
            graph.between[name].address = allocate(size);
            graph.between[name].capacityBytes = size;
        }
    }

    // One engine on its buffers; what it leaves to later ones is entered into `buffers`.
    nv::IExecutionContext& bindStage(Stage const& stage, Buffers const& between, Buffers& buffers) {
        nv::ICudaEngine const& engine = *stage.engine;
        auto const inputs = tensorsOf(engine, nv::TensorIOMode::kINPUT);
        int32_t const profile = chooseProfile(stage, inputs, buffers);
        nv::IExecutionContext& context = makeContext(stage);
        if (!context.setOptimizationProfileAsync(profile, stream_)) {
            throw Error(
                text("engine ", stage.name, " refuses profile ", profile, "; TensorRT's messages above say why"));
        }
        auto const setAddress = [&](std::string const& name, bool good) {
            Buffer const& buffer = buffers.at(name);
            DType const type = dtypeOfTensor(engine.getTensorDataType(name.c_str()), name);
            if (type != buffer.type) {
                throw Error(text("engine ", stage.name, " takes ", name, " as ", nameOf(type), ", its graph as ",
                                 nameOf(buffer.type), "; export the bundle again"));
            }
            if (!good || !context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(buffer.begin()))) {
                throw Error(text("engine ", stage.name, " refuses ", name, " of shape ", describe(buffer.shape),
                                 "; TensorRT's messages above say why"));
            }
        };
        for (std::string const& name : inputs) {
            setAddress(name, context.setInputShape(name.c_str(), dimsOf(buffers.at(name).shape)));
        }
        for (std::string const& name : tensorsOf(engine, nv::TensorIOMode::kOUTPUT)) {
            nv::Dims const found = context.getTensorShape(name.c_str());
            Shape const shape(found.d, found.d + std::max(found.nbDims, 0));
            auto const [buffer, isBetween] = buffers.try_emplace(name);
            if (isBetween) {
                buffer->second = between.at(name);
                buffer->second.type = dtypeOfTensor(engine.getTensorDataType(name.c_str()), name);
                buffer->second.shape = shape;
            } else if (shape != buffer->second.shape) {
                throw Error(text("engine ", stage.name, " gives ", name, " as ", describe(shape), ", the loop needs ",
                                 describe(buffer->second.shape), "; export the bundle again"));
            }
            setAddress(name, true);
        }
        return context;
    }

    nv::IExecutionContext& makeContext(Stage const& stage) {
        nv::ICudaEngine& engine = *stage.engine;
#if NV_TENSORRT_MAJOR >= 10
        contexts_.emplace_back(engine.createExecutionContext(nv::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#else
        contexts_.emplace_back(engine.createExecutionContextWithoutDeviceMemory());
#endif
        if (contexts_.back() == nullptr) {
            throw Error(text("engine ", stage.name, " gives no execution context; free GPU memory"));
        }
#if NV_TENSORRT_MAJOR >= 10
        contexts_.back()->setDeviceMemoryV2(reinterpret_cast<void*>(scratch_), static_cast<int64_t>(scratchBytes_));
#else
        contexts_.back()->setDeviceMemory(reinterpret_cast<void*>(scratch_));
#endif
        return *contexts_.back();
    }

    static std::vector<std::string> tensorsOf(nv::ICudaEngine const& engine, nv::TensorIOMode mode) {
        std::vector<std::string> names;
        for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
            char const* const name = engine.getIOTensorName(i);
            if (engine.getTensorIOMode(name) == mode) {
                names.emplace_back(name);
            }
        }
        return names;
    }

    // Whether the engines have the inputs and outputs of their graph, and no others.
    static void checkNames(std::string const& graph, Graph const& stages, Buffers const& inputs,
                           Buffers const& outputs) {
        for (bool const isInput : {true, false}) {
            Buffers const& given = isInput ? inputs : outputs;
            std::set<std::string> found;
            for (Stage const& stage : stages.stages) {
                for (std::string const& name :
                     tensorsOf(*stage.engine, isInput ? nv::TensorIOMode::kINPUT : nv::TensorIOMode::kOUTPUT)) {
                    if (given.count(name) == 0 && stages.between.count(name) == 0) {
                        throw Error(text("engine ", stage.name, " has an ", isInput ? "input " : "output ", name,
                                         " that its graph does not have; export the bundle again"));
                    }
                    found.insert(name);
                }
            }
            for (auto const& [name, buffer] : given) {
                if (found.count(name) == 0) {
                    throw Error(text("engine ", graph, " lacks the ", isInput ? "input " : "output ", name,
                                     " of its graph; export the bundle again"));
                }
            }
        }
    }

    // A tensor of fixed shape is in no profile.
    static nv::Dims limitOf(nv::ICudaEngine const& engine, std::string const& name, int32_t profile,
                            nv::OptProfileSelector which) {
        nv::Dims const shape = engine.getTensorShape(name.c_str());
        return std::count(shape.d, shape.d + shape.nbDims, -1) == 0
                   ? shape
                   : engine.getProfileShape(name.c_str(), profile, which);
    }

    // The profile that was made for these shapes: the one whose optimum they are, else the first that takes them.
    static int32_t chooseProfile(Stage const& stage, std::vector<std::string> const& inputs, Buffers const& buffers) {
        nv::ICudaEngine const& engine = *stage.engine;
        int32_t first = -1;
        for (int32_t profile = 0; profile < engine.getNbOptimizationProfiles(); ++profile) {
            bool fits = true;
            bool exact = true;
            for (std::string const& name : inputs) {
                Shape const& shape = buffers.at(name).shape;
                nv::Dims const least = limitOf(engine, name, profile, nv::OptProfileSelector::kMIN);
                nv::Dims const best = limitOf(engine, name, profile, nv::OptProfileSelector::kOPT);
                nv::Dims const most = limitOf(engine, name, profile, nv::OptProfileSelector::kMAX);
                for (size_t i = 0; i < shape.size(); ++i) {
                    fits = fits && static_cast<int32_t>(shape.size()) == most.nbDims && least.d[i] <= shape[i] &&
                           shape[i] <= most.d[i];
                    exact = exact && best.d[i] == shape[i];
                }
            }
            if (fits && exact) {
                return profile;
            }
            if (fits && first < 0) {
                first = profile;
            }
        }
        if (first < 0) {
            std::string shapes;
            for (std::string const& name : inputs) {
                shapes += text(shapes.empty() ? "" : ", ", name, " ", describe(buffers.at(name).shape));
            }
            throw Error(text("engine ", stage.name, " has no profile for ", shapes, "; export the bundle again"));
        }
        return first;
    }

    Cuda const& cuda_;
    bool cudaGraphs_;
    int device_;
    CUdevice handle_ = 0;
    CUcontext context_ = nullptr;
    CUstream stream_ = nullptr;
    std::string gpu_;
    Logger logger_;
    Library library_;
    std::unique_ptr<nv::IRuntime> runtime_;
    std::map<std::string, Graph> graphs_;
    std::deque<std::unique_ptr<nv::IExecutionContext>> contexts_;
    std::vector<CUgraphExec> captured_;
    std::vector<CUdeviceptr> allocated_;
    uint64_t scratch_ = 0;
    size_t scratchBytes_ = 0;
    void* staging_ = nullptr;
    size_t stagingBytes_ = 0;
};

}  // namespace

std::unique_ptr<Target> openTensorRt(Bundle const& bundle, int64_t batch, TensorRtOptions const& options) {
    return std::make_unique<TensorRt>(bundle, batch, options);
}

}  // namespace toprovar::runtime
