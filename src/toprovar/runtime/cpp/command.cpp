#include "command.hpp"

#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "error.hpp"
#include "loop.hpp"
#include "png.hpp"
#include "safetensors.hpp"
#include "session.hpp"

namespace toprovar::runtime {

namespace {

constexpr char const* kUSAGE = R"(toprovar_run: runs a bundle with no Python

  toprovar_run BUNDLE --label NAME [--seed N] [-o OUT.png]
  toprovar_run BUNDLE --features FILE [--prompt-class NAME] [--seed N] [-o OUT.png]
  toprovar_run BUNDLE --verify [--tolerance X]
  toprovar_run BUNDLE --bench [--repeat N] [--warmup N] > bench.json

  --label NAME         name or number of a class label; repeat for a batch
  --features FILE      safetensors with text_features [B, T, text_width] and text_lengths [B], such as
                       `toprovar encode` writes
  --prompt-class NAME  of a text; default: the first of the bundle
  --seed N             of the first picture, the next ones count up; default 0
  -o, --output FILE    PNG; of a batch, picture i goes to FILE with -i before its ending; default out.png
  --verify             replay the golden trace: tokens, and pictures within the tolerance
  --tolerance X        largest difference of a pixel in [0, 1]; default 0.001, in half precision 2/255
  --bench              measure, and print JSON as `toprovar bench` writes it
  --repeat N, --warmup N   measured runs (10) and runs before them (2)
  --batch N            images at once; default: as many as --label, else what the engines were built for
  --plugins FILE       plugin library; default: TOPROVAR_PLUGIN_LIBRARY, else beside this program
  --device N           GPU; default 0
  --no-cuda-graphs     launch every kernel from the host
  --no-hashes          do not compare the files with the manifest's hashes (sizes are always compared)
)";

struct Options {
    std::string bundle;
    std::vector<std::string> labels;
    std::string features;
    std::string promptClass;
    uint64_t seed = 0;
    std::string output = "out.png";
    bool verify = false;
    bool bench = false;
    std::optional<double> tolerance;
    int64_t repeat = 10;
    int64_t warmup = 2;
    int64_t batch = 0;
    bool hashes = true;
    TargetOptions target;
};

template <typename T>
T number(std::string const& option, std::string const& given, T least, T most) {
    std::istringstream in(given);
    T value{};
    bool const negative = !given.empty() && given[0] == '-' && std::is_unsigned<T>::value;
    if (negative || !(in >> value) || in.peek() != EOF || value < least || value > most) {
        throw Error(text(option, " is '", given, "'; valid are ", least, " to ", most));
    }
    return value;
}

Options parse(int argc, char const* const* argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        std::string const word = argv[i];
        auto const value = [&]() -> std::string {
            if (i + 1 >= argc) {
                throw Error(text(word, " needs a value; see --help"));
            }
            return argv[++i];
        };
        if (word == "--label") {
            options.labels.push_back(value());
        } else if (word == "--features") {
            options.features = value();
        } else if (word == "--prompt-class") {
            options.promptClass = value();
        } else if (word == "--seed") {
            options.seed = number<uint64_t>(word, value(), 0, UINT64_MAX);
        } else if (word == "-o" || word == "--output") {
            options.output = value();
        } else if (word == "--verify") {
            options.verify = true;
        } else if (word == "--bench") {
            options.bench = true;
        } else if (word == "--tolerance") {
            options.tolerance = number<double>(word, value(), 0, 1);
        } else if (word == "--repeat") {
            options.repeat = number<int64_t>(word, value(), 1, 1'000'000);
        } else if (word == "--warmup") {
            options.warmup = number<int64_t>(word, value(), 0, 1'000'000);
        } else if (word == "--batch") {
            options.batch = number<int64_t>(word, value(), 1, 65536);
        } else if (word == "--plugins") {
            options.target.plugins = value();
        } else if (word == "--device") {
            options.target.device = number<int>(word, value(), 0, 1023);
        } else if (word == "--no-cuda-graphs") {
            options.target.cudaGraphs = false;
        } else if (word == "--no-hashes") {
            options.hashes = false;
        } else if (!word.empty() && word[0] == '-') {
            throw Error(text("unknown option ", word, "; see --help"));
        } else if (options.bundle.empty()) {
            options.bundle = word;
        } else {
            throw Error(text("two bundles, ", options.bundle, " and ", word, "; give one"));
        }
    }
    if (options.bundle.empty()) {
        throw Error("no bundle is given; see --help");
    }
    return options;
}

void writeImages(Options const& options, Manifest const& manifest, std::vector<float> const& images, size_t count) {
    std::filesystem::path const path(options.output);
    size_t const size = images.size() / count;
    for (size_t i = 0; i < count; ++i) {
        std::filesystem::path one = path;
        if (count > 1) {
            one.replace_filename(text(path.stem().string(), "-", i, path.extension().string()));
        }
        auto const pixels = toBytes(images.data() + i * size, manifest.imageHeight, manifest.imageWidth);
        writePng(one, pixels.data(), manifest.imageHeight, manifest.imageWidth);
        std::cout << one.string() << '\n';
    }
}

int generate(Options const& options, Bundle const& bundle, Loop& loop) {
    Manifest const& manifest = bundle.manifest();
    auto const images = static_cast<size_t>(loop.batch());
    Condition condition;
    std::string promptClass = options.promptClass;
    if (manifest.takesText) {
        auto const tensors = readSafetensors(options.features);
        for (char const* name : {"text_features", "text_lengths"}) {
            if (tensors.count(name) == 0) {
                throw Error(text(options.features, ": has no ", name, "; write it with toprovar encode"));
            }
        }
        HostTensor const& features = tensors.at("text_features");
        auto const wanted = static_cast<size_t>(manifest.textTokens);
        Shape const& shape = features.shape;
        if (shape.size() != 3 || shape[0] != loop.batch() || shape[1] > manifest.textTokens ||
            shape[2] != manifest.textWidth) {
            throw Error(text(options.features, ": text_features is ", describe(shape), ", the bundle takes [",
                             loop.batch(), ", at most ", manifest.textTokens, ", ", manifest.textWidth, "]"));
        }
        auto const given = features.floats();
        auto const width = static_cast<size_t>(manifest.textWidth);
        auto const tokens = static_cast<size_t>(shape[1]);
        condition.textFeatures.assign(images * wanted * width, 0.F);
        for (size_t b = 0; b < images; ++b) {
            std::copy_n(given.begin() + static_cast<std::ptrdiff_t>(b * tokens * width), tokens * width,
                        condition.textFeatures.begin() + static_cast<std::ptrdiff_t>(b * wanted * width));
        }
        for (int64_t const length : tensors.at("text_lengths").integers()) {
            condition.textLengths.push_back(static_cast<int32_t>(length));
        }
        promptClass = promptClass.empty() ? manifest.promptClasses[0] : promptClass;
    } else {
        for (std::string const& label : options.labels) {
            int64_t const number = labelNumber(bundle, label);
            std::string const& its = manifest.labels[static_cast<size_t>(number)].promptClass;
            if (!promptClass.empty() && its != promptClass) {
                throw Error(text("label '", label, "' is of prompt class '", its, "', the one before it of '",
                                 promptClass, "'; a batch is of one class: run them one after the other"));
            }
            promptClass = its;
            condition.labels.push_back(static_cast<int32_t>(number));
        }
    }
    std::vector<uint64_t> seeds;
    for (size_t i = 0; i < images; ++i) {
        seeds.push_back(options.seed + i);
    }
    Trace const trace = loop.run(promptClass, condition, seeds);
    writeImages(options, manifest, trace.images, images);
    std::fprintf(stderr, "%.1f ms: prefix %.1f, transformer %.1f, decoder %.1f\n", trace.timing.totalMs,
                 trace.timing.prefixMs, trace.timing.transformerMs(), trace.timing.decodeMs);
    return 0;
}

int run(Options const& options, char const* targetName, OpenTarget const& openTarget) {
    Bundle const bundle(options.bundle, options.hashes);
    Manifest const& manifest = bundle.manifest();
    bool const pictures = !options.verify && !options.bench;
    if (pictures && manifest.takesText && options.features.empty()) {
        throw Error(text(options.bundle, ": pictures are asked for by text; give --features"));
    }
    if (pictures && !manifest.takesText && options.labels.empty()) {
        throw Error(text(options.bundle, ": pictures are asked for by label; give --label"));
    }
    auto const target = manifest.targets.find(targetName);
    int64_t batch = options.batch;
    if (batch == 0 && pictures && !manifest.takesText) {
        batch = static_cast<int64_t>(options.labels.size());
    }
    if (batch == 0) {
        batch = target != manifest.targets.end() && target->second.batch ? *target->second.batch : 1;
    }
    if (pictures && !manifest.takesText && batch != static_cast<int64_t>(options.labels.size())) {
        throw Error(text(options.labels.size(), " labels for a batch of ", batch, "; give one --label per image"));
    }
    for (std::string const& label : options.labels) {
        labelNumber(bundle, label);  // before anything is loaded
    }
    if (!options.promptClass.empty() && manifest.schedules.count(options.promptClass) == 0) {
        throw Error(text(options.bundle, ": no prompt class '", options.promptClass, "'; the first is '",
                         manifest.promptClasses[0], "'"));
    }
    auto const opened = openTarget(bundle, batch, options.target);
    Loop loop(bundle, *opened, batch);
    if (options.verify) {
        bool passed = true;
        for (ClassVerdict const& verdict : verify(bundle, loop, options.tolerance)) {
            std::cout << verdict.line() << '\n';
            passed = passed && verdict.passed();
        }
        if (!passed) {
            return 1;
        }
    }
    if (options.bench) {
        std::cout << bench(bundle, loop, targetName, opened->description(), options.repeat, options.warmup,
                           options.tolerance)
                         .dump(1)
                  << '\n';
    }
    return pictures ? generate(options, bundle, loop) : 0;
}

}  // namespace

int runCommand(int argc, char const* const* argv, char const* targetName, OpenTarget const& openTarget) {
    for (int i = 1; i < argc; ++i) {
        if (std::string(argv[i]) == "--help" || std::string(argv[i]) == "-h") {
            std::cout << kUSAGE;
            return 0;
        }
    }
    try {
        return run(parse(argc, argv), targetName, openTarget);
    } catch (Error const& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 2;
    }
}

}  // namespace toprovar::runtime
