// Exact attention and Skeinformer on golden vectors, without Python.
//
//   sketchattn golden vectors
//   c++ -std=c++17 -O2 -o attention examples/cpp/attention.cpp
//   ./attention mine.safetensors vectors/exact-*.safetensors vectors/skeinformer-*.safetensors
//   sketchattn check vectors --output mine.safetensors --cases 'exact-*,skeinformer-*'
//
// Every number is float: what is checked is float32.  The reader knows what golden vectors need:
// arrays of float, double, 64-bit integers and booleans, on a little-endian machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// --- the format: 8 bytes of length, a JSON header, numbers -------------------------------------

struct Tensor {
    std::string dtype;
    std::vector<long> shape;
    std::vector<double> data;  // exact for all of them: indices are small

    double operator[](size_t i) const { return data[i]; }
};

using Tensors = std::map<std::string, Tensor>;

// The part of JSON that a header is made of: objects, strings, integers and lists of integers.
class Header {
  public:
    explicit Header(const std::string& text) : text(text) {}

    struct Entry {
        std::string dtype;
        std::vector<long> shape, offsets;
    };

    std::map<std::string, Entry> read() {
        std::map<std::string, Entry> entries;
        each([&](const std::string& name) {
            if (name == "__metadata__") {
                each([&](const std::string&) { string(); });
                return;
            }
            Entry& entry = entries[name];
            each([&](const std::string& key) {
                if (key == "dtype") entry.dtype = string();
                else if (key == "shape") entry.shape = integers();
                else if (key == "data_offsets") entry.offsets = integers();
                else throw std::runtime_error("unknown key " + key);
            });
        });
        return entries;
    }

  private:
    std::string text;
    size_t at = 0;

    char next() {
        while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
        if (at >= text.size()) throw std::runtime_error("the header ends too early");
        return text[at];
    }

    void expect(char wanted) {
        if (next() != wanted) throw std::runtime_error(std::string("no ") + wanted + " in header");
        ++at;
    }

    std::string string() {
        expect('"');
        std::string found;
        while (at < text.size() && text[at] != '"') {
            if (text[at] == '\\') ++at;  // names have no escapes; what is in metadata is not read
            found += text[at++];
        }
        expect('"');
        return found;
    }

    std::vector<long> integers() {
        std::vector<long> found;
        expect('[');
        while (next() != ']') {
            if (text[at] == ',') ++at;
            char* end = nullptr;
            found.push_back(std::strtol(text.c_str() + at, &end, 10));
            if (end == text.c_str() + at) throw std::runtime_error("no integer in the header");
            at = static_cast<size_t>(end - text.c_str());
        }
        expect(']');
        return found;
    }

    template <class Visit>
    void each(Visit visit) {
        expect('{');
        while (next() != '}') {
            if (text[at] == ',') ++at;
            const std::string name = string();
            expect(':');
            visit(name);
        }
        expect('}');
    }
};

template <class T>
void widen(const char* bytes, size_t size, std::vector<double>& out) {
    for (size_t i = 0; i + sizeof(T) <= size; i += sizeof(T)) {
        T x;
        std::memcpy(&x, bytes + i, sizeof(T));
        out.push_back(static_cast<double>(x));
    }
}

Tensors read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::uint64_t length = 0;
    if (raw.size() < 8) throw std::runtime_error(path + " is too short");
    std::memcpy(&length, raw.data(), 8);
    if (length > raw.size() - 8) throw std::runtime_error(path + " is too short");
    const char* data = raw.data() + 8 + length;
    const size_t rest = raw.size() - 8 - length;
    Tensors tensors;
    for (const auto& [name, entry] : Header(raw.substr(8, length)).read()) {
        const size_t start = entry.offsets.at(0), stop = entry.offsets.at(1);
        if (start > stop || stop > rest) throw std::runtime_error(path + " is too short");
        Tensor& x = tensors[name];
        x.dtype = entry.dtype;
        x.shape = entry.shape;
        if (x.dtype == "F32") widen<float>(data + start, stop - start, x.data);
        else if (x.dtype == "F64") widen<double>(data + start, stop - start, x.data);
        else if (x.dtype == "I64") widen<std::int64_t>(data + start, stop - start, x.data);
        else if (x.dtype == "BOOL") widen<std::uint8_t>(data + start, stop - start, x.data);
        else throw std::runtime_error(path + " has numbers of kind " + x.dtype);
    }
    return tensors;
}

struct Output {
    std::string name;
    std::vector<long> shape;
    std::vector<float> data;
};

void write(const std::string& path, const std::vector<Output>& outputs) {
    std::string header = "{", data;
    for (const Output& x : outputs) {
        if (header.size() > 1) header += ",";
        header += "\"" + x.name + "\":{\"dtype\":\"F32\",\"shape\":[";
        for (size_t i = 0; i < x.shape.size(); ++i)
            header += (i ? "," : "") + std::to_string(x.shape[i]);
        const size_t bytes = x.data.size() * sizeof(float);
        header += "],\"data_offsets\":[" + std::to_string(data.size()) + ",";
        header += std::to_string(data.size() + bytes) + "]}";
        data.append(reinterpret_cast<const char*>(x.data.data()), bytes);
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const std::uint64_t length = header.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), 8);
    file << header << data;
    if (!file) throw std::runtime_error(path + " cannot be written");
}

// --- attention ---------------------------------------------------------------------------------

constexpr float INF = std::numeric_limits<float>::infinity();

struct Case {
    Tensors tensors;
    long heads, kv_heads, n_q, n_k, d, d_v;
    float scale, softcap;
    long first, left, right;
    bool causal;

    explicit Case(const std::string& path) : tensors(read(path)) {
        const Tensor &q = at("q"), &k = at("k"), &v = at("v");
        heads = q.shape.at(0), n_q = q.shape.at(1), d = q.shape.at(2);
        kv_heads = k.shape.at(0), n_k = k.shape.at(1), d_v = v.shape.at(2);
        scale = static_cast<float>(at("scale")[0]);
        softcap = static_cast<float>(at("softcap")[0]);
        causal = at("causal")[0] != 0;
        first = static_cast<long>(at("first")[0]);
        left = static_cast<long>(at("window")[0]), right = static_cast<long>(at("window")[1]);
    }

    const Tensor& at(const std::string& name) const { return tensors.at(name); }
    const Tensor* find(const std::string& name) const {
        const auto found = tensors.find(name);
        return found == tensors.end() ? nullptr : &found->second;
    }
    long kv(long h) const { return h / (heads / kv_heads); }
    float value(long h, long j, long c) const {
        return static_cast<float>(at("v")[(kv(h) * n_k + j) * d_v + c]);
    }

    bool visible(long i, long j) const {
        const long position = first + i;
        if (causal && j > position) return false;
        if (left >= 0 && j < position - left) return false;
        if (right >= 0 && j > position + right) return false;
        if (const Tensor* keep = find("key_mask"); keep && (*keep)[j] == 0) return false;
        if (const Tensor* mask = find("mask"); mask && (*mask)[i * n_k + j] == 0) return false;
        if (const Tensor* bias = find("bias"); bias && std::isinf((*bias)[i * n_k + j])) return false;
        return true;
    }

    // The order is scale, softcap, bias.
    float logit(long h, long i, long j) const {
        const Tensor &q = at("q"), &k = at("k");
        float x = 0;
        for (long t = 0; t < d; ++t)
            x += static_cast<float>(q[(h * n_q + i) * d + t]) *
                 static_cast<float>(k[(kv(h) * n_k + j) * d + t]);
        x *= scale;
        if (softcap > 0) x = softcap * std::tanh(x / softcap);
        if (const Tensor* bias = find("bias")) x += static_cast<float>((*bias)[i * n_k + j]);
        return x;
    }

    // Write row i of exact attention and return its logsumexp.
    float exact_row(long h, long i, float* out) const {
        std::vector<float> logits(n_k, -INF);
        float top = -INF;
        for (long j = 0; j < n_k; ++j)
            if (visible(i, j)) top = std::max(top, logits[j] = logit(h, i, j));
        const Tensor* sink = find("sink");
        if (sink) top = std::max(top, static_cast<float>((*sink)[h]));
        std::fill(out, out + d_v, 0.0f);
        if (top == -INF) return -INF;  // a row that sees no key is zero
        float total = sink ? std::exp(static_cast<float>((*sink)[h]) - top) : 0.0f;
        for (long j = 0; j < n_k; ++j) {
            if (!visible(i, j)) continue;
            const float weight = std::exp(logits[j] - top);
            total += weight;
            for (long c = 0; c < d_v; ++c) out[c] += weight * value(h, j, c);
        }
        for (long c = 0; c < d_v; ++c) out[c] /= total;
        return top + std::log(total);
    }

    // Write row i of Skeinformer for the drawn columns: they have their own weights, and every
    // other visible key the geometric mean of these.
    void sampled_row(long h, long i, const std::set<long>& columns, float* out) const {
        std::map<long, float> logits;
        float top = -INF, sum = 0;
        for (const long j : columns)
            if (visible(i, j)) {
                const float x = logit(h, i, j);
                top = std::max(top, logits[j] = x);
                sum += x;
            }
        std::fill(out, out + d_v, 0.0f);
        float fill = logits.empty() ? 1.0f : std::exp(sum / static_cast<float>(logits.size()) - top);
        float total = 0;
        for (long j = 0; j < n_k; ++j) {
            if (!visible(i, j)) continue;
            const auto drawn = logits.find(j);
            const float weight = drawn == logits.end() ? fill : std::exp(drawn->second - top);
            total += weight;
            for (long c = 0; c < d_v; ++c) out[c] += weight * value(h, j, c);
        }
        if (total > 0)
            for (long c = 0; c < d_v; ++c) out[c] /= total;
    }
};

std::set<long> indices(const Tensor& x) {
    std::set<long> found;
    for (const double i : x.data) found.insert(static_cast<long>(i));
    return found;
}

void solve(const std::string& name, const Case& x, std::vector<Output>& outputs) {
    Output out{name, {x.heads, x.n_q, x.d_v}, std::vector<float>(x.heads * x.n_q * x.d_v)};
    Output lse{name + ".lse", {x.heads, x.n_q}, std::vector<float>(x.heads * x.n_q)};
    const bool exact = name.rfind("exact", 0) == 0;
    for (long h = 0; h < x.heads; ++h) {
        std::set<long> columns, pilots;
        if (!exact) {
            const std::string draw = "draw." + std::to_string(h) + ".";
            columns = indices(x.at(draw + "columns"));
            pilots = indices(x.at(draw + "pilot_rows"));
        }
        for (long i = 0; i < x.n_q; ++i) {
            float* row = &out.data[(h * x.n_q + i) * x.d_v];
            if (exact || pilots.count(i)) lse.data[h * x.n_q + i] = x.exact_row(h, i, row);
            else x.sampled_row(h, i, columns, row);
        }
    }
    outputs.push_back(out);
    if (exact) outputs.push_back(lse);
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: attention OUTPUT.safetensors CASE.safetensors...\n";
        return 2;
    }
    try {
        std::vector<Output> outputs;
        for (int i = 2; i < argc; ++i) {
            std::string name = argv[i];
            name = name.substr(name.find_last_of('/') + 1);
            name = name.substr(0, name.rfind(".safetensors"));
            solve(name, Case(argv[i]), outputs);
        }
        write(argv[1], outputs);
    } catch (const std::exception& error) {
        std::cerr << "attention: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
