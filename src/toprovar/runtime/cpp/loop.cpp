#include "loop.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "error.hpp"

namespace toprovar::runtime {

namespace {

constexpr char const* kZEROS = "zeros";      // stands in for restore caches that are not filled yet
constexpr char const* kSCRATCH = "scratch";  // takes span deltas that no cache takes
// Above all others, which are 0: no noise, guidance or temperature changes the choice, and fp16 holds the sum of both.
constexpr float kCERTAIN_LOGIT = 1e3F;

std::string numbered(char const* name, size_t i) {
    return text(name, "_", i);
}

Shape withLength(int64_t length, Shape shape) {
    shape[0] = length;
    return shape;
}

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Buffers merged(std::initializer_list<Buffers const*> parts) {
    Buffers all;
    for (Buffers const* part : parts) {  // later ones win, as in the Python loop
        for (auto const& [name, buffer] : *part) {
            all[name] = buffer;
        }
    }
    return all;
}

}  // namespace

Buffer Buffer::view(Shape const& wanted, int64_t firstRow) const {
    Buffer part = *this;
    part.shape = wanted;
    int64_t row = 1;
    for (size_t i = 1; i < wanted.size(); ++i) {
        row *= wanted[i];
    }
    part.offsetBytes = offsetBytes + static_cast<size_t>(firstRow * row) * sizeOf(type);
    if (part.offsetBytes + part.sizeBytes() > capacityBytes) {
        throw std::logic_error(text("a view ", describe(wanted), " from byte ", part.offsetBytes,
                                    " leaves a buffer of ", capacityBytes, " bytes"));
    }
    return part;
}

double Timing::transformerMs() const noexcept {
    double sum = 0;
    for (ScaleTiming const& scale : scales) {
        sum += scale.stepMs;
    }
    return sum;
}

Loop::Loop(Bundle const& bundle, Target& target, int64_t batch)
    : bundle_(bundle),
      target_(target),
      manifest_(bundle.manifest()),
      batch_(batch),
      rows_(batch * bundle.manifest().rowsPerImage) {
    allocate();
    uploadConstants();
    allocateContext();
    int64_t const first = manifest_.schedules.at(manifest_.promptClasses[0])[0].tokens;
    Buffers const start{{"x", x(first)}};
    prefix_ = bind("prefix", buffers_, merged({&context_, &start}));
    for (auto const& [name, steps] : manifest_.schedules) {
        bool filled = false;
        for (size_t i = 0; i < steps.size(); ++i) {
            int64_t const following = steps[(i + 1) % steps.size()].tokens;  // unused at the last
            turns_[name].push_back(bindTurn(i, steps[i], following, filled));
            filled = filled || steps[i].capturesSpanDelta;
        }
    }
    for (size_t turn = 0; turn < 2; ++turn) {
        decode_[turn] = bind("decoder", {{"codes", codes(turn)}}, buffers_);
    }
}

Buffer Loop::codes(size_t turn) const {
    return buffers_.at(turn % 2 == 0 ? "codes" : "codes_out");
}

// --- memory ---------------------------------------------------------------------------------------------------------

void Loop::allocate() {
    int64_t tokens = 1;
    int64_t keep = 1;
    int64_t lengthGlobal = 1;
    int64_t lengthDetail = 1;
    int64_t mostCached = 1;
    for (auto const& [name, steps] : manifest_.schedules) {
        for (ScaleStep const& step : steps) {
            tokens = std::max(tokens, step.tokens);
            keep = std::max(keep, step.keep);
            lengthGlobal = std::max(lengthGlobal, step.pastGlobal + step.tokens);
            lengthDetail = std::max(lengthDetail, step.pastDetail + step.keep);
            mostCached = std::max({mostCached, cached(step), step.capturesSpanDelta ? step.tokens : 1});
        }
    }
    Shape codeShape{batch_};
    codeShape.insert(codeShape.end(), manifest_.codeShape.begin(), manifest_.codeShape.end());
    std::map<std::string, Shape> shapes{
        {"labels", {batch_}},
        {"text_features", {batch_, manifest_.textTokens, manifest_.textWidth}},
        {"text_lengths", {batch_}},
        {"x", {tokens, rows_, manifest_.width}},
        {"logits", {tokens, rows_, manifest_.logits}},
        {"noise", {tokens, batch_, manifest_.logits}},
        {"keep_slots", {keep}},
        {"codes", codeShape},
        {"codes_out", codeShape},
        {"image", {batch_, 3, manifest_.imageHeight, manifest_.imageWidth}},
    };
    for (size_t layer = 0; layer < manifest_.roles.size(); ++layer) {
        int64_t const length = manifest_.roles[layer] == 'g' ? lengthGlobal : lengthDetail;
        for (char const* name : {"past_k", "past_v"}) {
            shapes[numbered(name, layer)] = {length, rows_, manifest_.heads, manifest_.headDim};
        }
    }
    for (size_t span = 0; span < manifest_.nbSpans(); ++span) {
        shapes[numbered("span_cache", span)] = {mostCached, rows_, manifest_.width};
    }
    for (auto const& [graphName, graph] : manifest_.graphs) {
        for (auto const* tensors : {&graph.inputs, &graph.outputs}) {
            for (TensorInfo const& tensor : *tensors) {
                auto const shape = shapes.find(tensor.name);
                if (shape != shapes.end() && buffers_.count(tensor.name) == 0) {
                    buffers_[tensor.name] = reserve(tensor.type, shape->second);
                }
                if (tensor.name == "span_cache_0" && buffers_.count(kZEROS) == 0) {
                    buffers_[kZEROS] = reserve(tensor.type, shape->second);
                    buffers_[kSCRATCH] = reserve(tensor.type, {keep, rows_, manifest_.width});
                }
            }
        }
    }
    for (char const* name : {"x", "logits", "codes", "codes_out", "image"}) {
        if (buffers_.count(name) == 0) {
            throw Error(text(bundle_.root().string(), ": no graph has a tensor '", name,
                             "'; export the bundle with this version of toprovar"));
        }
    }
}

void Loop::allocateContext() {
    std::map<std::string, int64_t> const sizes{{"B", batch_}, {"R", rows_}, {"T", manifest_.textTokens}};
    for (TensorInfo const& tensor : bundle_.graph("prefix").outputs) {
        if (tensor.name == "x") {
            continue;
        }
        Shape shape;
        for (Dimension const& size : tensor.shape) {
            auto const known = sizes.find(size.name);
            if (!size.isNumber() && known == sizes.end()) {
                throw Error(text(bundle_.root().string(), ": ", tensor.name, " has a size '", size.name,
                                 "'; valid there: numbers, B, R, T"));
            }
            shape.push_back(size.isNumber() ? size.size : known->second);
        }
        context_[tensor.name] = reserve(tensor.type, shape);
    }
}

void Loop::uploadConstants() {
    for (auto const& [name, tensor] : bundle_.constants()) {
        constants_[name] = reserve(tensor.type, tensor.shape);
        if (!tensor.bytes.empty()) {
            target_.write(constants_[name], tensor.bytes.data());
        }
    }
}

Buffer Loop::reserve(DType type, Shape const& shape) {
    Buffer buffer;
    buffer.type = type;
    buffer.shape = shape;
    buffer.capacityBytes = std::max<size_t>(buffer.sizeBytes(), 1);  // an empty tensor has an address too
    buffer.address = target_.allocate(buffer.capacityBytes);
    return buffer;
}

// --- scales ---------------------------------------------------------------------------------------------------------

Loop::Turn Loop::bindTurn(size_t index, ScaleStep const& step, int64_t following, bool filled) {
    Buffers constants;
    for (auto const& [input, tensor] : step.constants) {
        constants[input] = constants_.at(tensor);
    }
    Buffers inputs{{"x", x(step.tokens)}};
    Buffers outputs{{"logits", buffers_.at("logits").view({step.tokens, rows_, manifest_.logits})}};
    if (buffers_.count("keep_slots") != 0) {
        inputs["keep_slots"] = buffers_.at("keep_slots").view({step.keep});
    }
    for (size_t layer = 0; layer < manifest_.roles.size(); ++layer) {
        bool const global = manifest_.roles[layer] == 'g';
        int64_t const past = global ? step.pastGlobal : step.pastDetail;
        int64_t const fresh = global ? step.tokens : step.keep;
        for (char const* kind : {"k", "v"}) {
            std::string const name = numbered(text("past_", kind).c_str(), layer);
            auto const cache = buffers_.find(name);
            if (cache == buffers_.end()) {
                continue;  // bind() says so if a graph asks for it
            }
            inputs[name] = cache->second.view(withLength(past, cache->second.shape));
            outputs[numbered(text("new_", kind).c_str(), layer)] =
                cache->second.view(withLength(fresh, cache->second.shape), past);
        }
    }
    size_t const spans = buffers_.count(kZEROS) != 0 ? manifest_.nbSpans() : 0;
    for (size_t span = 0; span < spans; ++span) {
        std::string const name = numbered("span_cache", span);
        Buffer const& cache = buffers_.at(name);
        Buffer const& read = filled ? cache : buffers_.at(kZEROS);
        Buffer const& written = step.capturesSpanDelta ? cache : buffers_.at(kSCRATCH);
        inputs[name] = read.view(withLength(cached(step), cache.shape));
        outputs[numbered("span_delta", span)] = written.view(withLength(step.keep, cache.shape));
    }
    Turn turn;
    turn.scale = step.scale;
    turn.step = bind("step", merged({&context_, &constants, &inputs}), outputs);

    Shape tokenShape{batch_, step.tokens};
    bool found = false;
    for (TensorInfo const& tensor : bundle_.graph("advance").outputs) {
        if (tensor.name == "tokens") {
            for (size_t i = 2; i < tensor.shape.size(); ++i) {
                tokenShape.push_back(tensor.shape[i].size);
            }
            turn.tokens = reserve(tensor.type, tokenShape);  // each scale keeps its own, read once at the end
            found = true;
        }
    }
    if (!found) {
        throw Error(text(bundle_.root().string(), ": advance has no output tokens; export the bundle again"));
    }
    turn.logits = outputs.at("logits");
    Buffers given{{"logits", turn.logits}, {"codes", codes(index)}};
    if (buffers_.count("noise") != 0) {
        turn.hasNoise = true;
        turn.noise = buffers_.at("noise").view({step.tokens, batch_, manifest_.logits});
        given["noise"] = turn.noise;
    }
    turn.advance = bind("advance", merged({&constants, &given}),
                        {{"tokens", turn.tokens},
                         {"codes_out", codes(index + 1)},
                         {"next_x", x(following)}});  // the step has read x by now
    return turn;
}

// Rows of a restore cache as the step reads it: the source cells of its resize matrices.
int64_t Loop::cached(ScaleStep const& step) const {
    int64_t cells = 1;
    for (char const* name : {"area_rows", "area_cols"}) {
        auto const key = step.constants.find(name);
        if (key != step.constants.end()) {
            Shape const& shape = bundle_.constants().at(key->second).shape;
            if (shape.size() != 2) {
                throw Error(text(bundle_.root().string(), ": constant '", key->second, "' has shape ", describe(shape),
                                 ", valid are two sizes; export the bundle again"));
            }
            cells *= shape[1];
        }
    }
    return cells;
}

Buffer Loop::x(int64_t tokens) const {
    return buffers_.at("x").view({tokens, rows_, manifest_.width});
}

Run Loop::bind(std::string const& graph, Buffers const& inputs, Buffers const& outputs) {
    GraphInfo const& info = bundle_.graph(graph);
    return target_.bind(graph, take(graph, info.inputs, inputs, "input"), take(graph, info.outputs, outputs, "output"));
}

Buffers Loop::take(std::string const& graph, std::vector<TensorInfo> const& tensors, Buffers const& from,
                   char const* kind) const {
    Buffers taken;
    for (TensorInfo const& tensor : tensors) {
        auto const found = from.find(tensor.name);
        if (found == from.end()) {
            throw Error(text(bundle_.root().string(), ": ", graph, " has an ", kind, " '", tensor.name,
                             "' that the loop does not know; export the bundle with this version of toprovar"));
        }
        if (found->second.type != tensor.type) {
            throw Error(text(bundle_.root().string(), ": ", graph, " takes ", tensor.name, " as ", nameOf(tensor.type),
                             ", it is ", nameOf(found->second.type), "; export the bundle again"));
        }
        taken[tensor.name] = found->second;
    }
    return taken;
}

// --- running --------------------------------------------------------------------------------------------------------

Trace Loop::run(std::string const& promptClass, Condition const& condition, std::vector<uint64_t> const& seeds,
                Tokens const* follow) {
    auto const turns = turns_.find(promptClass);
    if (turns == turns_.end()) {
        throw Error(text(bundle_.root().string(), ": no prompt class '", promptClass, "'"));
    }
    if (static_cast<int64_t>(seeds.size()) != batch_) {
        throw Error(text(seeds.size(), " seeds for a batch of ", batch_, " images; give one seed per image"));
    }
    double const start = now();
    if (manifest_.takesText) {
        writeFloats("text_features", condition.textFeatures);
        writeIntegers("text_lengths", condition.textLengths);
    } else {
        writeIntegers("labels", condition.labels);
    }
    writeFloats("codes", std::vector<float>(buffers_.at("codes").count(), 0.F));

    NoiseAhead noise(seeds, static_cast<size_t>(manifest_.logits), noisePieces(turns->second));
    Trace trace;
    trace.timing.prefixMs = measured(prefix_);
    for (size_t i = 0; i < turns->second.size(); ++i) {
        Turn const& turn = turns->second[i];
        ScaleTiming timing;
        timing.scale = turn.scale;
        double const begin = now();
        if (turn.hasNoise) {
            target_.write(turn.noise, noise.wait(i));
        }
        timing.noiseMs = now() - begin;
        timing.stepMs = measured(turn.step);
        timing.advanceMs = measured(turn.advance);
        trace.timing.scales.push_back(timing);
        if (follow != nullptr) {
            auto const& tokens = follow->at(turn.scale);
            auto const& drawn = trace.tokens[turn.scale] = readTokens(turn);
            std::vector<float> certain = chosen(turn, tokens);
            trace.margins[turn.scale] = margins(turn, tokens, drawn, certain);
            for (float& logit : certain) {
                logit *= kCERTAIN_LOGIT;
            }
            writeLogits(turn, certain);
            turn.advance();  // reads the codes that it read before, and writes over what it gave
        }
    }
    size_t const last = turns->second.size();
    trace.timing.decodeMs = measured(decode_[last % 2]);
    trace.images = readFloats(buffers_.at("image"));
    trace.timing.totalMs = now() - start;

    for (Turn const& turn : turns->second) {
        if (follow == nullptr) {
            trace.tokens[turn.scale] = readTokens(turn);
        }
    }
    trace.codes = readFloats(codes(last));
    return trace;
}

// Where the noise of each turn lies in the target's staging memory, one behind the other; none in a loop that takes
// none.
std::vector<NoiseAhead::Piece> Loop::noisePieces(std::vector<Turn> const& turns) {
    size_t bytes = 0;
    for (Turn const& turn : turns) {
        bytes += turn.hasNoise ? turn.noise.sizeBytes() : 0;
    }
    std::vector<NoiseAhead::Piece> pieces;
    auto* out = bytes > 0 ? static_cast<float*>(target_.staging(bytes)) : nullptr;
    for (Turn const& turn : turns) {
        if (turn.hasNoise) {
            pieces.push_back({static_cast<uint32_t>(turn.scale), static_cast<size_t>(turn.noise.shape[0]), out});
            out += turn.noise.count();
        }
    }
    return pieces;
}

double Loop::measured(Run const& run) {
    double const begin = now();
    run();
    target_.synchronize();
    return now() - begin;
}

void Loop::writeFloats(std::string const& name, std::vector<float> const& values) {
    Buffer const& buffer = buffers_.at(name);
    if (values.size() != buffer.count()) {
        throw Error(text(bundle_.root().string(), ": ", name, " has ", values.size(), " values; the bundle takes ",
                         describe(buffer.shape)));
    }
    std::vector<uint8_t> bytes(buffer.sizeBytes());
    fromFloat(values.data(), values.size(), buffer.type, bytes.data());
    target_.write(buffer, bytes.data());
}

void Loop::writeIntegers(std::string const& name, std::vector<int32_t> const& values) {
    auto const found = buffers_.find(name);
    if (found == buffers_.end() || values.size() != found->second.count() || found->second.type != DType::kINT32) {
        throw Error(text(bundle_.root().string(), ": ", name, " has ", values.size(),
                         " values; the bundle takes one int32 per image of its batch of ", batch_));
    }
    target_.write(found->second, values.data());
}

std::vector<int64_t> Loop::readTokens(Turn const& turn) {
    HostTensor tokens;
    tokens.type = turn.tokens.type;
    tokens.shape = turn.tokens.shape;
    tokens.bytes.resize(turn.tokens.sizeBytes());
    target_.read(turn.tokens, tokens.bytes.data());
    return tokens.integers();
}

// 1 at these tokens, [B, N], or [B, N, bits] with V = bits * 2, and 0 elsewhere, [N, R, V] as logits are.
std::vector<float> Loop::chosen(Turn const& turn, std::vector<int64_t> const& tokens) const {
    if (tokens.size() != turn.tokens.count()) {
        throw Error(text(bundle_.root().string(), ": golden tokens of scale ", turn.scale, " are ", tokens.size(),
                         " values, not ", turn.tokens.count(), "; export it again"));
    }
    int64_t const count = turn.logits.shape[0];
    int64_t const values = turn.logits.shape[2];
    int64_t const bits = static_cast<int64_t>(tokens.size()) / (batch_ * count);
    int64_t const choices = values / bits;
    std::vector<float> chosen(turn.logits.count(), 0.F);
    for (int64_t n = 0; n < count; ++n) {
        for (int64_t row = 0; row < rows_; ++row) {
            for (int64_t bit = 0; bit < bits; ++bit) {
                // A golden trace may hold any number; it is counted as wrong where tokens are compared.
                auto const from = static_cast<size_t>(((row % batch_) * count + n) * bits + bit);
                int64_t const choice = std::clamp<int64_t>(tokens[from], 0, choices - 1);
                chosen[static_cast<size_t>((n * rows_ + row) * values + bit * choices + choice)] = 1;
            }
        }
    }
    return chosen;
}

// Of a turn that has run and drawn `drawn`; leaves other logits behind.
std::vector<double> Loop::margins(Turn const& turn, std::vector<int64_t> const& tokens,
                                  std::vector<int64_t> const& drawn, std::vector<float> const& chosen) {
    std::vector<double> found(tokens.size(), INFINITY);
    size_t left = tokens.size();
    auto const note = [&](std::vector<int64_t> const& now, double margin) {
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (std::isinf(found[i]) && now[i] == tokens[i]) {
                found[i] = margin;
                --left;
            }
        }
    };
    note(drawn, 0);
    if (left == 0) {
        return found;
    }
    std::vector<float> const logits = readFloats(turn.logits);
    float largest = 0;
    for (float const logit : logits) {
        largest = std::max(largest, std::fabs(logit));
    }
    std::vector<float> raised(logits.size());
    for (double margin = kSMALLEST_MARGIN; margin <= kWIDEST_MARGIN && left > 0; margin *= 2) {
        auto const much = static_cast<float>(margin) * largest;
        for (size_t i = 0; i < logits.size(); ++i) {
            raised[i] = logits[i] + much * chosen[i];
        }
        writeLogits(turn, raised);
        turn.advance();
        note(readTokens(turn), margin);
    }
    return found;
}

void Loop::writeLogits(Turn const& turn, std::vector<float> const& values) {
    std::vector<uint8_t> bytes(turn.logits.sizeBytes());
    fromFloat(values.data(), values.size(), turn.logits.type, bytes.data());
    target_.write(turn.logits, bytes.data());
}

std::vector<float> Loop::readFloats(Buffer const& buffer) {
    std::vector<uint8_t> bytes(buffer.sizeBytes());
    target_.read(buffer, bytes.data());
    std::vector<float> values(buffer.count());
    toFloat(bytes.data(), values.size(), buffer.type, values.data());
    return values;
}

}  // namespace toprovar::runtime
