// A bundle on disk: its manifest, checked before anything in it is trusted (profiles/manifest.py says what it means).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dtype.hpp"
#include "safetensors.hpp"

namespace toprovar::runtime {

// A size of a graph's tensor: a number, or the name of one.
struct Dimension {
    int64_t size = -1;
    std::string name;

    bool isNumber() const noexcept { return name.empty(); }
};

struct TensorInfo {
    std::string name;
    DType type = DType::kFLOAT32;
    std::vector<Dimension> shape;
};

struct GraphInfo {
    std::string file;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
};

struct ScaleStep {
    int64_t scale = 0;
    int64_t gridHeight = 0;
    int64_t gridWidth = 0;
    int64_t tokens = 0;
    int64_t keep = 0;
    int64_t pastGlobal = 0;
    int64_t pastDetail = 0;
    bool capturesSpanDelta = false;
    bool last = false;
    std::map<std::string, std::string> constants;
};

struct Label {
    std::string name;
    std::string promptClass;
};

struct FileInfo {
    std::string sha256;
    uint64_t sizeBytes = 0;
};

// What was built for a target; empty where the manifest does not say.
struct TargetInfo {
    std::map<std::string, std::string> engines;
    std::string version;
    std::string gpu;
    std::string computeCapability;
    std::optional<int64_t> batch;
};

struct Manifest {
    std::string name;
    std::string backbone;
    std::string precision;
    std::string toprovarVersion;

    int64_t width = 0;
    int64_t heads = 0;
    int64_t headDim = 0;
    int64_t logits = 0;
    std::string roles;
    int64_t rowsPerImage = 0;
    Shape codeShape;
    int64_t imageHeight = 0;
    int64_t imageWidth = 0;

    bool takesText = false;
    std::vector<Label> labels;
    int64_t textWidth = 0;
    int64_t textTokens = 0;

    std::string profile;
    std::string planSha256;
    std::string checkpointSha256;

    std::map<std::string, GraphInfo> graphs;
    std::vector<std::string> promptClasses;  // in the order of the manifest
    std::map<std::string, std::vector<ScaleStep>> schedules;
    std::map<std::string, TargetInfo> targets;
    std::map<std::string, FileInfo> files;

    // Maximal runs of detail layers.
    size_t nbSpans() const noexcept;
};

class Bundle {
public:
    // Opens and checks a bundle: schema, contract version, every file inside the folder, there, of its size and, with
    // `verify`, of its hash. Throws Error that says which is not.
    explicit Bundle(std::filesystem::path root, bool verify = true);

    std::filesystem::path const& root() const noexcept { return root_; }
    Manifest const& manifest() const noexcept { return manifest_; }
    std::string const& manifestSha256() const noexcept { return manifestSha256_; }
    uint64_t sizeBytes() const noexcept;

    // Where a file of the manifest lies; throws Error where the manifest does not list it.
    std::filesystem::path path(std::string const& name) const;

    // Throws Error where the bundle has no such graph.
    GraphInfo const& graph(std::string const& name) const;

    // The small tensors of the scales.
    std::map<std::string, HostTensor> const& constants() const noexcept { return constants_; }

    // The golden trace; throws Error where there is none.
    std::map<std::string, HostTensor> golden() const;

private:
    std::filesystem::path inside(std::string const& name) const;

    std::filesystem::path root_;
    Manifest manifest_;
    std::string manifestSha256_;
    std::map<std::string, HostTensor> constants_;
};

}  // namespace toprovar::runtime
