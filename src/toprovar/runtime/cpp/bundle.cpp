#include "bundle.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "error.hpp"
#include "sha256.hpp"
#include "toprovar/contract.hpp"

namespace toprovar::runtime {

namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr char const* kMANIFEST = "manifest.json";
constexpr char const* kSCHEMA = "toprovar.bundle/1";
constexpr uint64_t kMOST_MANIFEST_BYTES = 64 << 20;
constexpr int64_t kMOST_SIZE = int64_t{1} << 31;

// One object of the manifest: every key has to be asked for, so that an unknown one is found by done().
class Object {
public:
    Object(Json const& json, std::string place) : json_(json), place_(std::move(place)) {
        if (!json.is_object()) {
            throw Error(text(place_, " is no object"));
        }
    }

    bool has(char const* key) {
        known_.insert(key);
        auto const found = json_.find(key);
        return found != json_.end() && !found->is_null();
    }

    Json const& at(char const* key) {
        if (!has(key)) {
            throw Error(text(place_, ".", key, " is missing"));
        }
        return json_.at(key);
    }

    std::string string(char const* key) {
        Json const& value = at(key);
        if (!value.is_string()) {
            throw Error(text(place_, ".", key, " is no string"));
        }
        return value.get<std::string>();
    }

    int64_t integer(char const* key, int64_t least, int64_t most = kMOST_SIZE) {
        return integer(at(key), text(place_, ".", key), least, most);
    }

    static int64_t integer(Json const& value, std::string const& place, int64_t least, int64_t most = kMOST_SIZE) {
        if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX)) {
            throw Error(text(place, " is ", value.dump(), "; valid are integers from ", least, " to ", most));
        }
        auto const number = value.get<int64_t>();
        if (number < least || number > most) {
            throw Error(text(place, " is ", number, "; valid are ", least, " to ", most));
        }
        return number;
    }

    std::vector<int64_t> integers(char const* key, size_t count, int64_t least) {
        Json const& value = at(key);
        if (!value.is_array() || value.size() != count) {
            throw Error(text(place_, ".", key, " is ", value.dump(), "; valid are ", count, " integers"));
        }
        std::vector<int64_t> numbers;
        for (Json const& one : value) {
            numbers.push_back(integer(one, text(place_, ".", key), least));
        }
        return numbers;
    }

    bool boolean(char const* key) {
        if (!has(key)) {
            return false;
        }
        Json const& value = at(key);
        if (!value.is_boolean()) {
            throw Error(text(place_, ".", key, " is ", value.dump(), "; valid are true and false"));
        }
        return value.get<bool>();
    }

    void ignore(std::initializer_list<char const*> keys) { known_.insert(keys.begin(), keys.end()); }

    void done() const {
        for (auto const& [key, value] : json_.items()) {
            if (known_.count(key) == 0) {
                throw Error(text(place_, " has an unknown key '", key, "'"));
            }
        }
    }

private:
    Json const& json_;
    std::string place_;
    std::set<std::string> known_;
};

TensorInfo readTensor(Json const& json, std::string const& place) {
    Object object(json, place);
    TensorInfo tensor;
    tensor.name = object.string("name");
    tensor.type = dtypeOf(object.string("dtype"));
    Json const& shape = object.at("shape");
    if (!shape.is_array()) {
        throw Error(text(place, ".shape is no list"));
    }
    for (Json const& size : shape) {
        Dimension dimension;
        if (size.is_string()) {
            dimension.name = size.get<std::string>();
        } else {
            dimension.size = Object::integer(size, place + ".shape", 0);
        }
        tensor.shape.push_back(dimension);
    }
    object.done();
    return tensor;
}

GraphInfo readGraph(Json const& json, std::string const& place) {
    Object object(json, place);
    GraphInfo graph;
    graph.file = object.string("file");
    for (Json const& tensor : object.at("inputs")) {
        graph.inputs.push_back(readTensor(tensor, place + ".inputs"));
    }
    for (Json const& tensor : object.at("outputs")) {
        graph.outputs.push_back(readTensor(tensor, place + ".outputs"));
    }
    object.done();
    return graph;
}

std::vector<ScaleStep> readSchedule(Json const& json, std::string const& place) {
    Object object(json, place);
    std::vector<ScaleStep> steps;
    int64_t pastGlobal = 0;
    int64_t pastDetail = 0;
    int captures = 0;
    for (Json const& one : object.at("steps")) {
        std::string const here = text(place, ".steps[", steps.size(), "]");
        Object step(one, here);
        ScaleStep read;
        read.scale = step.integer("scale", steps.empty() ? 0 : steps.back().scale + 1);
        auto const grid = step.integers("grid", 2, 1);
        read.gridHeight = grid[0];
        read.gridWidth = grid[1];
        read.tokens = step.integer("tokens", 1);
        read.keep = step.integer("keep", 1, read.tokens);
        read.pastGlobal = step.integer("past_global", 0);
        read.pastDetail = step.integer("past_detail", 0);
        read.capturesSpanDelta = step.boolean("capture_span_delta");
        read.last = step.boolean("last");
        if (step.has("constants")) {
            for (auto const& [input, tensor] : step.at("constants").items()) {
                if (!tensor.is_string()) {
                    throw Error(text(here, ".constants.", input, " is no string"));
                }
                read.constants[input] = tensor.get<std::string>();
            }
        }
        step.done();
        if (read.tokens != read.gridHeight * read.gridWidth) {
            throw Error(text(here, ": ", read.tokens, " tokens are not ", read.gridHeight, " x ", read.gridWidth));
        }
        if (read.pastGlobal != pastGlobal || read.pastDetail != pastDetail) {
            throw Error(text(here, ": past is ", read.pastGlobal, " and ", read.pastDetail,
                             " tokens, the scales before it leave ", pastGlobal, " and ", pastDetail));
        }
        captures += read.capturesSpanDelta ? 1 : 0;
        if ((read.capturesSpanDelta && read.keep != read.tokens) || captures > 1) {
            throw Error(text(here, ": captures span deltas, which one dense step may do"));
        }
        pastGlobal += read.tokens;
        pastDetail += read.keep;
        steps.push_back(read);
    }
    object.done();
    if (steps.empty()) {
        throw Error(text(place, " has no steps"));
    }
    for (ScaleStep const& step : steps) {
        if (step.last != (&step == &steps.back())) {
            throw Error(text(place, ": scale ", step.scale, ": last is true for the final step and no other"));
        }
    }
    return steps;
}

TargetInfo readTarget(Json const& json, std::string const& place) {
    Object object(json, place);
    TargetInfo target;
    if (object.has("engines")) {
        for (auto const& [graph, file] : object.at("engines").items()) {
            if (!file.is_string()) {
                throw Error(text(place, ".engines.", graph, " is no string"));
            }
            target.engines[graph] = file.get<std::string>();
        }
    }
    target.version = object.has("version") ? object.string("version") : "";
    target.gpu = object.has("gpu") ? object.string("gpu") : "";
    target.computeCapability = object.has("compute_capability") ? object.string("compute_capability") : "";
    if (object.has("batch")) {
        target.batch = object.integer("batch", 1);
    }
    object.ignore({"driver", "cache_key"});
    object.done();
    return target;
}

void readModel(Object model, Manifest& manifest) {
    auto const depth = model.integer("depth", 1, 4096);
    manifest.width = model.integer("width", 1);
    manifest.heads = model.integer("heads", 1);
    manifest.headDim = model.integer("head_dim", 1);
    manifest.logits = model.integer("logits", 2);
    manifest.roles = model.string("roles");
    manifest.rowsPerImage = model.has("rows_per_image") ? model.integer("rows_per_image", 1, 2) : 2;
    manifest.codeShape = model.integers("code_shape", 3, 1);
    auto const size = model.integers("image_size", 2, 1);
    manifest.imageHeight = size[0];
    manifest.imageWidth = size[1];
    model.ignore({"parameters"});
    model.done();
    if (manifest.roles.empty() || manifest.roles[0] != 'g' ||
        manifest.roles.find_first_not_of("gd") != std::string::npos ||
        static_cast<int64_t>(manifest.roles.size()) != depth) {
        throw Error(text("model.roles is '", manifest.roles, "'; valid are ", depth, " letters g or d, g first"));
    }
}

void readCondition(Object condition, Manifest& manifest) {
    std::string const kind = condition.string("kind");
    if (kind != "label" && kind != "text") {
        throw Error(text("condition.kind is '", kind, "'; valid are label and text"));
    }
    manifest.takesText = kind == "text";
    if (condition.has("labels")) {
        for (Json const& one : condition.at("labels")) {
            Object label(one, "condition.labels");
            manifest.labels.push_back({label.string("name"), label.string("prompt_class")});
            label.done();
        }
    }
    manifest.textWidth = condition.has("text_width") ? condition.integer("text_width", 1) : 0;
    manifest.textTokens = condition.has("text_maximum_tokens") ? condition.integer("text_maximum_tokens", 1) : 0;
    condition.ignore({"text_encoder", "prompt_classes", "examples"});
    condition.done();
}

Manifest readManifest(Json const& json) {
    Object object(json, "manifest");
    Manifest manifest;
    object.ignore({"schema", "contract_version", "sampling"});
    manifest.toprovarVersion = object.string("toprovar_version");
    manifest.name = object.string("name");
    manifest.backbone = object.string("backbone");
    manifest.precision = object.string("precision");
    readModel(Object(object.at("model"), "model"), manifest);
    readCondition(Object(object.at("condition"), "condition"), manifest);
    Object provenance(object.at("provenance"), "provenance");
    manifest.profile = provenance.string("profile");
    manifest.planSha256 = provenance.string("plan_sha256");
    manifest.checkpointSha256 = provenance.string("checkpoint_sha256");
    provenance.ignore({"profile_sha256", "calibration_sha256", "load_options"});
    provenance.done();
    for (auto const& [name, graph] : object.at("graphs").items()) {
        manifest.graphs[name] = readGraph(graph, "graphs." + name);
    }
    for (auto const& [name, schedule] : object.at("schedules").items()) {
        manifest.promptClasses.push_back(name);
        manifest.schedules[name] = readSchedule(schedule, "schedules." + name);
    }
    for (auto const& [name, target] : object.at("targets").items()) {
        manifest.targets[name] = readTarget(target, "targets." + name);
    }
    for (auto const& [name, file] : object.at("files").items()) {
        Object info(file, "files." + name);
        manifest.files[name] = {info.string("sha256"), static_cast<uint64_t>(info.integer("size_bytes", 0, INT64_MAX))};
        info.done();
    }
    object.done();

    if (manifest.schedules.empty()) {
        throw Error("schedules is empty");
    }
    for (Label const& label : manifest.labels) {
        if (manifest.schedules.count(label.promptClass) == 0) {
            throw Error(
                text("label '", label.name, "' is of prompt class '", label.promptClass, "', which has no schedule"));
        }
    }
    return manifest;
}

}  // namespace

size_t Manifest::nbSpans() const noexcept {
    size_t spans = 0;
    for (size_t i = 0; i < roles.size(); ++i) {
        spans += roles[i] == 'd' && (i == 0 || roles[i - 1] != 'd') ? 1 : 0;
    }
    return spans;
}

Bundle::Bundle(fs::path root, bool verify) : root_(std::move(root)) {
    std::error_code failed;
    if (!fs::is_directory(root_, failed) || !fs::is_regular_file(root_ / kMANIFEST, failed)) {
        throw Error(text(root_.string(), ": has no ", kMANIFEST,
                         "; a bundle is a folder with one, written by toprovar export"));
    }
    fs::path const path = inside(kMANIFEST);
    if (fs::file_size(path, failed) > kMOST_MANIFEST_BYTES) {
        throw Error(text(path.string(), ": is larger than ", kMOST_MANIFEST_BYTES, " bytes; copy the bundle again"));
    }
    std::ifstream file(path, std::ios::binary);
    std::string const raw{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    manifestSha256_ = sha256(raw.data(), raw.size());
    try {
        Json const json = Json::parse(raw);
        // The version first: what another schema holds would only be reported as unknown keys.
        if (!json.is_object() || !json.contains("schema") || json["schema"] != kSCHEMA) {
            std::string const found = json.is_object() && json.contains("schema") ? json["schema"].dump() : "missing";
            throw Error(text("schema is ", found, ", this toprovar reads \"", kSCHEMA, "\"; export the bundle again"));
        }
        int64_t const contractVersion = Object(json, "manifest").integer("contract_version", 0);
        if (contractVersion != contract::kCONTRACT_VERSION) {
            throw Error(text("made for version ", contractVersion, " of the op contract, this toprovar has version ",
                             contract::kCONTRACT_VERSION, "; export the bundle again"));
        }
        manifest_ = readManifest(json);
    } catch (nlohmann::json::exception const& error) {
        throw Error(text(path.string(), ": ", error.what(), "; copy the bundle again, or export it again"));
    } catch (Error const& error) {
        throw Error(text(path.string(), ": ", error.what(), "; copy the bundle again, or export it again"));
    }

    for (auto const& [name, info] : manifest_.files) {
        fs::path const one = inside(name);
        if (!fs::is_regular_file(one, failed)) {
            throw Error(text(root_.string(), ": ", name, " is missing; copy the whole folder, or export it again"));
        }
        uint64_t const size = fs::file_size(one, failed);
        if (size != info.sizeBytes) {
            throw Error(text(root_.string(), ": ", name, " has ", size, " bytes, the manifest says ", info.sizeBytes,
                             "; copy the bundle again"));
        }
    }
    for (auto const& [name, info] : manifest_.files) {
        if (!verify) {
            break;
        }
        std::string const digest = sha256File(inside(name));
        if (digest != info.sha256) {
            throw Error(text(root_.string(), ": ", name, " has changed since the bundle was written (sha256 ",
                             digest.substr(0, 12), "..., the manifest says ", info.sha256.substr(0, 12),
                             "...); copy the bundle again"));
        }
    }
    for (auto const& [name, graphInfo] : manifest_.graphs) {
        this->path(graphInfo.file);
    }
    if (manifest_.files.count("constants.safetensors") != 0) {
        constants_ = readSafetensors(this->path("constants.safetensors"));
    }
    for (auto const& [name, steps] : manifest_.schedules) {
        for (ScaleStep const& step : steps) {
            for (auto const& [input, tensor] : step.constants) {
                if (constants_.count(tensor) == 0) {
                    throw Error(text(root_.string(), ": scale ", step.scale, " needs '", tensor,
                                     "', which is not in constants.safetensors; export the bundle again"));
                }
            }
        }
    }
}

uint64_t Bundle::sizeBytes() const noexcept {
    uint64_t size = 0;
    for (auto const& [name, info] : manifest_.files) {
        size += info.sizeBytes;
    }
    return size;
}

fs::path Bundle::path(std::string const& name) const {
    if (manifest_.files.count(name) == 0) {
        throw Error(text(root_.string(), ": the manifest lists no ", name, "; export the bundle again"));
    }
    return inside(name);
}

GraphInfo const& Bundle::graph(std::string const& name) const {
    auto const found = manifest_.graphs.find(name);
    if (found == manifest_.graphs.end()) {
        throw Error(text(root_.string(), ": has no graph '", name, "'; export the bundle again"));
    }
    return found->second;
}

std::map<std::string, HostTensor> Bundle::golden() const {
    return readSafetensors(path("golden.safetensors"));
}

// A name that leads out of the folder is refused, also behind symbolic links.
fs::path Bundle::inside(std::string const& name) const {
    fs::path const relative(name);
    bool climbs = name.empty() || relative.is_absolute() || name.find('\\') != std::string::npos ||
                  name.find('\0') != std::string::npos;
    for (fs::path const& part : relative) {
        climbs = climbs || part == "..";
    }
    std::error_code failed;
    fs::path const base = fs::canonical(root_, failed);
    fs::path const real = climbs || failed ? fs::path() : fs::weakly_canonical(root_ / relative, failed);
    if (climbs || failed || std::mismatch(base.begin(), base.end(), real.begin(), real.end()).first != base.end()) {
        throw Error(
            text(root_.string(), ": '", name, "' leads outside the bundle's folder; a bundle holds its own files"));
    }
    return root_ / relative;
}

}  // namespace toprovar::runtime
