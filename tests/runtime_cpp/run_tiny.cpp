// toprovar_run with the toy model of tests/runtime/tiny.py in place of engines: the loop, its buffers and the command
// line are the real ones, only the graphs are C++ on the host. test_loop.py drives it.
//   run_tiny HEAD.bin [what toprovar_run takes]      HEAD.bin: the toy's output matrix, [4, 7] fp32

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <numeric>
#include <vector>

#include "command.hpp"
#include "error.hpp"

namespace {

using namespace toprovar::runtime;

constexpr int64_t kWIDTH = 4;
constexpr int64_t kLOGITS = 7;
constexpr int64_t kSIDE = 3;
constexpr size_t kALIGNMENT = 64;

// A tensor of the toy: floats in the target's memory.
struct View {
    float* data = nullptr;
    Shape shape;

    float& at(int64_t i, int64_t j, int64_t k = 0) const {
        int64_t const inner = shape.size() > 2 ? volume(shape) / shape[0] / shape[1] : 1;
        return data[(i * shape[1] + j) * inner + k];
    }
};

class Tiny final : public Target {
public:
    explicit Tiny(std::vector<float> head) : head_(std::move(head)) {}

    std::string description() const override { return "toy model on the host"; }

    uint64_t allocate(size_t sizeBytes) override {
        memory_.push_back(std::make_unique<std::vector<uint8_t>>(sizeBytes + kALIGNMENT, 0));
        auto const address = reinterpret_cast<uint64_t>(memory_.back()->data());
        return (address + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT;
    }
    void write(Buffer const& buffer, void const* values) override {
        std::memcpy(reinterpret_cast<void*>(buffer.begin()), values, buffer.sizeBytes());
    }
    void read(Buffer const& buffer, void* values) override {
        std::memcpy(values, reinterpret_cast<void const*>(buffer.begin()), buffer.sizeBytes());
    }
    void synchronize() override {}
    void* staging(size_t sizeBytes) override {
        staging_.resize(sizeBytes);
        return staging_.data();
    }

    Run bind(std::string const& graph, Buffers const& inputs, Buffers const& outputs) override {
        auto const in = std::make_shared<Buffers>(inputs);
        auto const out = std::make_shared<Buffers>(outputs);
        if (graph == "prefix") {
            return [=] { prefix(*in, *out); };
        }
        if (graph == "step") {
            return [=] { step(*in, *out); };
        }
        if (graph == "advance") {
            return [=] { advance(*in, *out); };
        }
        return [=] { decode(*in, *out); };
    }

private:
    static View view(Buffers const& buffers, std::string const& name) {
        Buffer const& buffer = buffers.at(name);
        return {reinterpret_cast<float*>(buffer.begin()), buffer.shape};
    }

    static void prefix(Buffers const& in, Buffers const& out) {
        auto const* const labels = reinterpret_cast<int32_t const*>(in.at("labels").begin());
        View const x = view(out, "x");
        View const context = view(out, "context");
        int64_t const rows = x.shape[1];
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < kWIDTH; ++c) {
                auto const phase = static_cast<float>((r < rows / 2 ? labels[r] : 0) + c);
                context.at(r, c) = std::cos(phase);
                x.at(0, r, c) = std::sin(phase);
            }
        }
    }

    // Keys of the layer go behind its past; sin(x + tanh(mean of keys * mean of values)).
    static std::vector<float> layer(std::vector<float> const& x, int64_t n, Buffers const& in, Buffers const& out,
                                    int i) {
        View const context = view(in, "context");
        View const pastK = view(in, text("past_k_", i));
        View const pastV = view(in, text("past_v_", i));
        View const newK = view(out, text("new_k_", i));
        View const newV = view(out, text("new_v_", i));
        int64_t const rows = context.shape[0];
        if (newK.shape != Shape{n, rows, 2, 2} || newV.shape != newK.shape) {
            throw std::logic_error("new keys of another shape");
        }
        std::vector<float> y(x.size());
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < kWIDTH; ++c) {
                for (int64_t t = 0; t < n; ++t) {
                    float const key = x[static_cast<size_t>((t * rows + r) * kWIDTH + c)] + context.at(r, c);
                    newK.at(t, r, c) = key;
                    newV.at(t, r, c) = key * key;
                }
                double keys = 0;
                double values = 0;
                for (int64_t t = 0; t < pastK.shape[0]; ++t) {
                    keys += pastK.at(t, r, c);
                    values += pastV.at(t, r, c);
                }
                for (int64_t t = 0; t < n; ++t) {
                    keys += newK.at(t, r, c);
                    values += newV.at(t, r, c);
                }
                double const count = static_cast<double>(pastK.shape[0] + n);
                double const branch = std::tanh(keys / count * (values / count));
                for (int64_t t = 0; t < n; ++t) {
                    auto const at = static_cast<size_t>((t * rows + r) * kWIDTH + c);
                    y[at] = static_cast<float>(std::sin(x[at] + branch));
                }
            }
        }
        return y;
    }

    void step(Buffers const& in, Buffers const& out) const {
        View const given = view(in, "x");
        int64_t const n = given.shape[0];
        int64_t const rows = given.shape[1];
        int64_t const keep = in.at("keep_slots").shape[0];
        std::vector<float> x(given.data, given.data + volume(given.shape));
        x = layer(x, n, in, out, 0);

        auto const at = [rows](int64_t t, int64_t r, int64_t c) {
            return static_cast<size_t>((t * rows + r) * kWIDTH + c);
        };
        std::vector<std::vector<int64_t>> kept;  // of each image
        for (int64_t b = 0; b < rows / 2; ++b) {
            std::vector<int64_t> order(static_cast<size_t>(n));
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(),
                             [&](int64_t i, int64_t j) { return x[at(i, b, 0)] < x[at(j, b, 0)]; });
            order.resize(static_cast<size_t>(keep));
            std::sort(order.begin(), order.end());
            kept.push_back(order);
        }
        std::vector<float> before(static_cast<size_t>(keep * rows * kWIDTH));
        auto const source = [&](int64_t k, int64_t r) {
            return kept[static_cast<size_t>(r % (rows / 2))][static_cast<size_t>(k)];
        };
        for (int64_t k = 0; k < keep; ++k) {
            for (int64_t r = 0; r < rows; ++r) {
                std::copy_n(&x[at(source(k, r), r, 0)], kWIDTH, &before[at(k, r, 0)]);
            }
        }
        std::vector<float> const after = layer(before, keep, in, out, 1);
        View const delta = view(out, "span_delta_0");

        View const areaRows = view(in, "area_rows");
        View const areaCols = view(in, "area_cols");
        View const cache = view(in, "span_cache_0");
        int64_t const w = areaCols.shape[0];
        int64_t const hc = areaRows.shape[1];
        int64_t const wc = areaCols.shape[1];
        if (areaRows.shape[0] * w != n || hc * wc != cache.shape[0]) {
            throw std::logic_error("a resize of another shape");
        }
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < kWIDTH; ++c) {
                    double sum = 0;
                    for (int64_t i = 0; i < hc; ++i) {
                        for (int64_t j = 0; j < wc; ++j) {
                            sum += double{areaRows.at(t / w, i)} * areaCols.at(t % w, j) * cache.at(i * wc + j, r, c);
                        }
                    }
                    x[at(t, r, c)] += static_cast<float>(sum);
                }
            }
        }
        for (int64_t k = 0; k < keep; ++k) {
            for (int64_t r = 0; r < rows; ++r) {
                std::copy_n(&after[at(k, r, 0)], kWIDTH, &x[at(source(k, r), r, 0)]);
            }
        }
        // Last: at a capturing step the delta goes where the cache was read.
        for (int64_t i = 0; i < volume(delta.shape); ++i) {
            delta.data[i] = after[static_cast<size_t>(i)] - before[static_cast<size_t>(i)];
        }
        x = layer(x, n, in, out, 2);
        View const logits = view(out, "logits");
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t v = 0; v < kLOGITS; ++v) {
                    float sum = 0;
                    for (int64_t c = 0; c < kWIDTH; ++c) {
                        sum += x[at(t, r, c)] * head_[static_cast<size_t>(c * kLOGITS + v)];
                    }
                    logits.at(t, r, v) = sum;
                }
            }
        }
    }

    static void advance(Buffers const& in, Buffers const& out) {
        View const logits = view(in, "logits");
        View const noise = view(in, "noise");
        View const codes = view(in, "codes");
        View const up = view(in, "up");
        View const down = view(in, "down");
        View const codesOut = view(out, "codes_out");
        View const next = view(out, "next_x");
        auto* const tokens = reinterpret_cast<int32_t*>(out.at("tokens").begin());
        int64_t const n = logits.shape[0];
        int64_t const images = noise.shape[1];
        int64_t const cells = kSIDE * kSIDE;
        for (int64_t b = 0; b < images; ++b) {
            std::vector<double> sum(codes.data + b * cells, codes.data + (b + 1) * cells);
            for (int64_t t = 0; t < n; ++t) {
                int32_t best = 0;
                double most = -1e30;
                for (int64_t v = 0; v < kLOGITS; ++v) {
                    double const conditional = logits.at(t, b, v);
                    double const mixed = conditional + 0.5 * (conditional - logits.at(t, images + b, v)) -
                                         std::log(-std::log(double{noise.at(t, b, v)}));
                    if (mixed > most) {
                        most = mixed;
                        best = static_cast<int32_t>(v);
                    }
                }
                tokens[b * n + t] = best;
                for (int64_t i = 0; i < cells; ++i) {
                    sum[static_cast<size_t>(i)] += double{up.at(t, i)} * best;
                }
            }
            for (int64_t i = 0; i < cells; ++i) {
                codesOut.data[b * cells + i] = static_cast<float>(sum[static_cast<size_t>(i)]);
            }
        }
        for (int64_t t = 0; t < next.shape[0]; ++t) {
            for (int64_t r = 0; r < next.shape[1]; ++r) {
                double pooled = 0;
                for (int64_t i = 0; i < cells; ++i) {
                    pooled += double{codesOut.data[r % images * cells + i]} * down.at(i, t);
                }
                for (int64_t c = 0; c < kWIDTH; ++c) {
                    next.at(t, r, c) = static_cast<float>(std::cos(pooled + static_cast<double>(c)));
                }
            }
        }
    }

    static void decode(Buffers const& in, Buffers const& out) {
        View const codes = view(in, "codes");
        View const image = view(out, "image");
        int64_t const side = image.shape[3];
        for (int64_t b = 0; b < image.shape[0]; ++b) {
            for (int64_t i = 0; i < 3 * side * side; ++i) {
                int64_t const y = i / side % side * kSIDE / side;
                int64_t const x = i % side * kSIDE / side;
                float const code = codes.data[(b * kSIDE + y) * kSIDE + x];
                image.data[b * 3 * side * side + i] = 1.F / (1.F + std::exp(-0.1F * code));
            }
        }
    }

    std::vector<float> head_;
    std::vector<std::unique_ptr<std::vector<uint8_t>>> memory_;
    std::vector<uint8_t> staging_;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        return 2;
    }
    std::vector<float> head(kWIDTH * kLOGITS);
    std::ifstream file(argv[1], std::ios::binary);
    file.read(reinterpret_cast<char*>(head.data()), static_cast<std::streamsize>(head.size() * sizeof(float)));
    if (!file) {
        std::cerr << argv[1] << ": not 28 floats\n";
        return 2;
    }
    return runCommand(argc - 1, argv + 1, "tensorrt",
                      [&](Bundle const&, int64_t, TargetOptions const&) { return std::make_unique<Tiny>(head); });
}
