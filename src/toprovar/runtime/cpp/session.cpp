#include "session.hpp"

#include <sys/sysinfo.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "error.hpp"
#include "toprovar/noise.hpp"

namespace toprovar::runtime {

namespace {

using Json = nlohmann::ordered_json;

// runtime/verify.py: IMAGE_TOLERANCE, MOST_FLIPS and WIDEST_MARGIN, by precision.
struct Limits {
    char const* precision;
    double image;
    double flips;
    double margin;
};
constexpr Limits kLIMITS[] = {
    {"float32", 1e-3, 1e-4, 1.0 / 4096}, {"float16", 2.0 / 255, 0.04, 1.0 / 32}, {"bfloat16", 2.0 / 255, 0.1, 1.0 / 8}};

Limits const& limitsOf(Bundle const& bundle) {
    for (Limits const& limits : kLIMITS) {
        if (bundle.manifest().precision == limits.precision) {
            return limits;
        }
    }
    throw Error(text(bundle.root().string(), ": precision '", bundle.manifest().precision,
                     "' is not known; valid are float32, float16 and bfloat16"));
}

HostTensor const& goldenTensor(Bundle const& bundle, std::map<std::string, HostTensor> const& golden,
                               std::string const& name) {
    auto const found = golden.find(name);
    if (found == golden.end()) {
        throw Error(text(bundle.root().string(), ": its golden trace has no ", name, "; export it again"));
    }
    return found->second;
}

// Rows [begin, begin + count) of the first axis; behind the end, the last row again, so that a batch is always full.
template <typename T>
std::vector<T> rows(std::vector<T> const& values, size_t nbRows, size_t begin, size_t count) {
    std::vector<T> taken;
    size_t const row = values.size() / nbRows;
    for (size_t i = begin; i < begin + count; ++i) {
        auto const first = values.begin() + static_cast<std::ptrdiff_t>(std::min(i, nbRows - 1) * row);
        taken.insert(taken.end(), first, first + static_cast<std::ptrdiff_t>(row));
    }
    return taken;
}

double quantile(std::vector<double> values, double q) {
    std::sort(values.begin(), values.end());
    double const at = q * static_cast<double>(values.size() - 1);
    auto const low = static_cast<size_t>(at);
    size_t const high = std::min(low + 1, values.size() - 1);
    return values[low] + (at - std::floor(at)) * (values[high] - values[low]);
}

Json quantiles(std::vector<Timing> const& timings, std::function<double(Timing const&)> const& get) {
    std::vector<double> values;
    for (Timing const& timing : timings) {
        values.push_back(get(timing));
    }
    auto const rounded = [&](double q) { return std::round(quantile(values, q) * 1e3) / 1e3; };
    return {{"median", rounded(0.5)}, {"q20", rounded(0.2)}, {"q80", rounded(0.8)}};
}

Json describeMachine(std::string const& toprovarVersion) {
    std::time_t const seconds = std::time(nullptr);
    char time[32] = {};
    std::tm utc{};
    gmtime_r(&seconds, &utc);
    std::strftime(time, sizeof(time), "%Y-%m-%dT%H:%M:%S+00:00", &utc);
    utsname system{};
    uname(&system);
    std::string processor = "unknown";
    std::ifstream cpus("/proc/cpuinfo");
    for (std::string line; std::getline(cpus, line);) {
        if (line.rfind("model name", 0) == 0 && line.find(':') != std::string::npos) {
            processor = line.substr(line.find(':') + 2);
            break;
        }
    }
    Json memory;
    struct sysinfo info {};
    if (sysinfo(&info) == 0) {
        memory = std::round(static_cast<double>(info.totalram) * info.mem_unit / 0x1p30 * 10) / 10;
    }
    return {{"time_utc", time},       {"system", text(system.sysname, " ", system.machine)},
            {"processor", processor}, {"cores", std::thread::hardware_concurrency()},
            {"memory_gib", memory},   {"versions", {{"toprovar", toprovarVersion}}},
            {"commit", nullptr}};
}

// One full batch of a prompt class, as runtime/bench.py asks for it. Text features are noise: speed does not depend on
// what they say.
Timing runOnce(Bundle const& bundle, Loop& loop, std::string const& promptClass, uint64_t turn) {
    Manifest const& manifest = bundle.manifest();
    auto const images = static_cast<size_t>(loop.batch());
    std::vector<uint64_t> seeds;
    for (size_t i = 0; i < images; ++i) {
        seeds.push_back(turn * images + i);
    }
    Condition condition;
    if (manifest.takesText) {
        auto const count = static_cast<size_t>(manifest.textTokens * manifest.textWidth);
        condition.textFeatures.resize(images * count);
        scaleNoise(&turn, 1, 0, 0, 1, images * count, condition.textFeatures.data());
        condition.textLengths.assign(images, static_cast<int32_t>(manifest.textTokens));
    } else {
        std::vector<int32_t> labels;
        for (size_t i = 0; i < manifest.labels.size(); ++i) {
            if (manifest.labels[i].promptClass == promptClass) {
                labels.push_back(static_cast<int32_t>(i));
            }
        }
        if (labels.empty()) {
            throw Error(
                text(bundle.root().string(), ": prompt class '", promptClass, "' has no label to measure with"));
        }
        for (uint64_t const seed : seeds) {
            condition.labels.push_back(labels[seed % labels.size()]);
        }
    }
    return loop.run(promptClass, condition, seeds).timing;
}

}  // namespace

int64_t labelNumber(Bundle const& bundle, std::string const& label) {
    auto const& labels = bundle.manifest().labels;
    for (size_t i = 0; i < labels.size(); ++i) {
        if (labels[i].name == label) {
            return static_cast<int64_t>(i);
        }
    }
    bool const number =
        !label.empty() && label.size() < 10 && label.find_first_not_of("0123456789") == std::string::npos;
    if (number && std::stoul(label) < labels.size()) {
        return std::stol(label);
    }
    std::string names;
    for (size_t i = 0; i < labels.size() && i < 16; ++i) {
        names += (i > 0 ? ", " : "") + labels[i].name;
    }
    throw Error(text(bundle.root().string(), ": no label '", label, "'; valid: ", names,
                     labels.size() > 16 ? text(", ... (", labels.size(), " in all)") : "", ", or a number from 0 to ",
                     static_cast<int64_t>(labels.size()) - 1));
}

bool ClassVerdict::passed() const noexcept {
    return margin <= widestMargin && flips() <= mostFlips && imageError <= tolerance;
}

double ClassVerdict::flips() const noexcept {
    Count sum;
    for (auto const& [scale, count] : tokens) {
        sum.wrong += count.wrong;
        sum.all += count.all;
    }
    return static_cast<double>(sum.wrong) / static_cast<double>(sum.all);
}

std::string ClassVerdict::line() const {
    char rest[96];
    std::string found = text("tokens of all ", tokens.size(), " scales are equal");
    auto const first = std::find_if(tokens.begin(), tokens.end(), [](auto const& one) { return one.second.wrong > 0; });
    if (first != tokens.end()) {
        std::snprintf(rest, sizeof(rest), "%.2f%% (at most %.2f%%)", 100 * flips(), 100 * mostFlips);
        found = text("scale ", first->first, " is the first that differs, in ", first->second.wrong, " of ",
                     first->second.all, " tokens, all scales in ", rest);
        std::snprintf(rest, sizeof(rest), std::isinf(margin) ? "more than %.2f%%" : "up to %.2f%%",
                      100 * std::min(margin, kWIDEST_MARGIN));
        found += text(", by ", rest);
        std::snprintf(rest, sizeof(rest), " of the largest logit (at most %.2f%%)", 100 * widestMargin);
        found += rest;
    }
    std::snprintf(rest, sizeof(rest), "%.1e at most (tolerance %g)", imageError, tolerance);
    return text(promptClass, ": ", passed() ? "ok" : "WRONG", ", ", images, " images; ", found, "; pictures differ by ",
                rest);
}

std::vector<ClassVerdict> verify(Bundle const& bundle, Loop& loop, std::optional<double> tolerance) {
    auto const golden = bundle.golden();
    Limits const& limits = limitsOf(bundle);
    Manifest const& manifest = bundle.manifest();
    auto const batch = static_cast<size_t>(loop.batch());
    std::vector<ClassVerdict> verdicts;
    for (std::string const& name : manifest.promptClasses) {
        auto const get = [&](std::string const& tensor) -> HostTensor const& {
            return goldenTensor(bundle, golden, name + "/" + tensor);
        };
        auto const seeds = get("seeds").integers();
        size_t const images = seeds.size();
        if (images == 0) {
            throw Error(text(bundle.root().string(), ": its golden trace has no image of ", name, "; export it again"));
        }
        auto const expectedImages = get("image").floats();
        ClassVerdict verdict;
        verdict.promptClass = name;
        verdict.images = images;
        verdict.tolerance = tolerance.value_or(limits.image);
        verdict.mostFlips = limits.flips;
        verdict.widestMargin = limits.margin;
        for (size_t begin = 0; begin < images; begin += batch) {
            Condition condition;
            if (manifest.takesText) {
                condition.textFeatures = rows(get("text_features").floats(), images, begin, batch);
                auto const lengths = rows(get("text_lengths").integers(), images, begin, batch);
                condition.textLengths.assign(lengths.begin(), lengths.end());
            } else {
                auto const labels = rows(get("labels").integers(), images, begin, batch);
                condition.labels.assign(labels.begin(), labels.end());
            }
            auto const some = rows(seeds, images, begin, batch);
            Tokens follow;
            for (ScaleStep const& step : manifest.schedules.at(name)) {
                follow[step.scale] = rows(get(text("tokens_", step.scale)).integers(), images, begin, batch);
            }
            Trace const trace = loop.run(name, condition, {some.begin(), some.end()}, &follow);
            size_t const present = std::min(batch, images - begin);
            for (auto const& [scale, found] : trace.tokens) {
                ClassVerdict::Count& count = verdict.tokens[scale];
                size_t const all = found.size() / batch * present;
                auto const& margins = trace.margins.at(scale);
                for (size_t i = 0; i < all; ++i) {
                    count.wrong += found[i] != follow.at(scale)[i] ? 1 : 0;
                    verdict.margin = std::max(verdict.margin, margins[i]);
                }
                count.all += all;
            }
            auto const expected = rows(expectedImages, images, begin, batch);
            if (expected.size() != trace.images.size()) {
                throw Error(text(bundle.root().string(), ": golden images have ", expected.size(), " values, not ",
                                 trace.images.size(), "; export it again"));
            }
            for (size_t i = 0; i < trace.images.size() / batch * present; ++i) {
                double const difference = std::fabs(double{trace.images[i]} - double{expected[i]});
                // A NaN is as wrong as can be, and comparisons with it are false.
                verdict.imageError = std::isnan(difference) ? INFINITY : std::max(verdict.imageError, difference);
            }
        }
        verdicts.push_back(verdict);
    }
    return verdicts;
}

Json bench(Bundle const& bundle, Loop& loop, std::string const& target, std::string const& description, int64_t repeat,
           int64_t warmup, std::optional<double> tolerance) {
    Manifest const& manifest = bundle.manifest();
    for (ClassVerdict const& verdict : verify(bundle, loop, tolerance)) {
        if (!verdict.passed()) {
            throw Error(
                text(bundle.root().string(), ": fails its golden trace, so nothing is measured: ", verdict.line()));
        }
    }
    Json classes = Json::object();
    for (std::string const& name : manifest.promptClasses) {
        std::vector<Timing> timings;
        for (int64_t turn = 0; turn < warmup + repeat; ++turn) {
            Timing const timing = runOnce(bundle, loop, name, static_cast<uint64_t>(turn));
            if (turn >= warmup) {
                timings.push_back(timing);
            }
        }
        Json scales = Json::array();
        auto const& steps = manifest.schedules.at(name);
        for (size_t i = 0; i < steps.size(); ++i) {
            scales.push_back(
                {{"scale", steps[i].scale},
                 {"grid", {steps[i].gridHeight, steps[i].gridWidth}},
                 {"tokens", steps[i].tokens},
                 {"keep", steps[i].keep},
                 {"noise_ms", quantiles(timings, [i](Timing const& t) { return t.scales[i].noiseMs; })},
                 {"step_ms", quantiles(timings, [i](Timing const& t) { return t.scales[i].stepMs; })},
                 {"advance_ms", quantiles(timings, [i](Timing const& t) { return t.scales[i].advanceMs; })}});
        }
        classes[name] = {{"prefix_ms", quantiles(timings, [](Timing const& t) { return t.prefixMs; })},
                         {"scales", scales},
                         {"transformer_ms", quantiles(timings, [](Timing const& t) { return t.transformerMs(); })},
                         {"decode_ms", quantiles(timings, [](Timing const& t) { return t.decodeMs; })},
                         {"total_ms", quantiles(timings, [](Timing const& t) { return t.totalMs; })}};
    }
    Json const described{{"name", manifest.name},
                         {"backbone", manifest.backbone},
                         {"profile", manifest.profile},
                         {"precision", manifest.precision},
                         {"manifest_sha256", bundle.manifestSha256()},
                         {"plan_sha256", manifest.planSha256},
                         {"checkpoint_sha256", manifest.checkpointSha256},
                         {"size_bytes", bundle.sizeBytes()},
                         {"target", target},
                         {"runtime", description},
                         {"classes", classes}};
    return {{"schema", "toprovar.bench/1"},
            {"machine", describeMachine(TOPROVAR_VERSION)},
            {"settings", {{"batch", loop.batch()}, {"repeat", repeat}, {"warmup", warmup}}},
            {"bundles", Json::array({described})},
            {"ratios", Json::array()}};
}

}  // namespace toprovar::runtime
