// Decode from C++ with exported objects: neither Python nor the DSL's compiler at run time.
//
// A small paged cache with fixed pseudo-random values is made on the GPU, the schedule and decode objects run on a stream of
// their own, and out and lse are compared with double-precision attention on the CPU.
// Exit status: 0 if they agree, else 1.
#include <cuda_runtime_api.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashmla_cute.h"  // written by `flashmla-cute export`

namespace {

constexpr int kLatent = 512, kHeadDim = 576, kPage = 64, kTile = 64;
constexpr int kRecord = 8, kPart = 16, kMerge = 4;  // int32 of an item, of a part, and of a request to merge
constexpr int kHeads = 16;
const std::vector<int32_t> kLengths = {3000, 0, 77, 64};
const double kScale = 1.0 / std::sqrt(double(kHeadDim));
constexpr double kToleranceOut = 4e-3, kToleranceLse = 1e-4;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// ---------------------------------------------------------------------- bf16
uint16_t to_bf16(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

double from_bf16(uint16_t value) {
  uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// ---------------------------------------------------------------------- device tensors
constexpr DLDataType kBf16{kDLBfloat, 16, 1}, kF16{kDLFloat, 16, 1}, kF32{kDLFloat, 32, 1}, kI32{kDLInt, 32, 1};

// A dense tensor on GPU 0 that owns its memory.
class Tensor {
 public:
  Tensor(DLDataType dtype, std::vector<int64_t> shape) : shape_(std::move(shape)), strides_(shape_.size(), 1) {
    for (size_t i = shape_.size() - 1; i > 0; --i) strides_[i - 1] = strides_[i] * shape_[i];
    bytes_ = size_t(strides_[0] * shape_[0]) * dtype.bits / 8;
    void* data = nullptr;
    check(cudaMalloc(&data, bytes_), "cudaMalloc");
    check(cudaMemset(data, 0xFF, bytes_), "cudaMemset");  // NaN, or -1: what is not written shows
    view_ = DLTensor{data, {kDLCUDA, 0}, int32_t(shape_.size()), dtype, shape_.data(), strides_.data(), 0};
  }
  template <typename T>
  Tensor(DLDataType dtype, std::vector<int64_t> shape, const std::vector<T>& host) : Tensor(dtype, std::move(shape)) {
    if (host.size() * sizeof(T) != bytes_) throw std::logic_error("a host array of another size");
    check(cudaMemcpy(view_.data, host.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(view_.data); }

  DLTensor* view() { return &view_; }

  template <typename T>
  std::vector<T> to_host() const {
    std::vector<T> host(bytes_ / sizeof(T));
    check(cudaMemcpy(host.data(), view_.data, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  std::vector<int64_t> shape_, strides_;
  size_t bytes_;
  DLTensor view_;
};

// ---------------------------------------------------------------------- the problem
struct Problem {
  std::vector<uint16_t> q;           // (request, 1 query token, head, 576)
  std::vector<uint16_t> cache;       // (page, token, 1 kv head, 576)
  std::vector<int32_t> block_table;  // (request, tile)
  int64_t batch, num_pages, max_tiles;

  Problem() : batch(int64_t(kLengths.size())), num_pages(0), max_tiles(0) {
    std::vector<int64_t> counts;
    for (int32_t length : kLengths) {
      counts.push_back((length + kPage - 1) / kPage);
      num_pages += counts.back();
      max_tiles = std::max(max_tiles, counts.back());
    }
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<int32_t> order(num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    block_table.assign(size_t(batch * max_tiles), -1);  // entries past a request's end are never read
    auto page = order.begin();
    for (int64_t i = 0; i < batch; ++i) {
      std::copy(page, page + counts[i], block_table.begin() + i * max_tiles);
      page += counts[i];
    }
    q.resize(size_t(batch) * kHeads * kHeadDim);
    cache.resize(size_t(num_pages) * kPage * kHeadDim);
    for (auto* values : {&q, &cache}) {
      for (uint16_t& value : *values) value = to_bf16(normal(random));
    }
  }

  const uint16_t* token(int64_t request, int64_t index) const {
    int64_t page = block_table[size_t(request * max_tiles + index / kPage)];
    return &cache[size_t(page * kPage + index % kPage) * kHeadDim];
  }
};

struct Result {
  std::vector<double> out;  // (request, 1, head, 512)
  std::vector<double> lse;  // (request, head, 1)
};

Result reference(const Problem& problem) {
  Result result{std::vector<double>(size_t(problem.batch) * kHeads * kLatent, 0.0),
                std::vector<double>(size_t(problem.batch) * kHeads, -std::numeric_limits<double>::infinity())};
  for (int64_t i = 0; i < problem.batch; ++i) {
    for (int head = 0; head < kHeads && kLengths[i] > 0; ++head) {
      const size_t row = size_t(i * kHeads + head);
      std::vector<double> score(size_t(kLengths[i]), 0.0);
      for (size_t t = 0; t < score.size(); ++t) {
        const uint16_t* k = problem.token(i, int64_t(t));
        for (int d = 0; d < kHeadDim; ++d) score[t] += from_bf16(problem.q[row * kHeadDim + d]) * from_bf16(k[d]);
        score[t] *= kScale;
      }
      const double top = *std::max_element(score.begin(), score.end());
      double sum = 0.0;
      for (size_t t = 0; t < score.size(); ++t) {
        const double p = std::exp(score[t] - top);
        const uint16_t* v = problem.token(i, int64_t(t));
        sum += p;
        for (int d = 0; d < kLatent; ++d) result.out[row * kLatent + d] += p * from_bf16(v[d]);
      }
      for (int d = 0; d < kLatent; ++d) result.out[row * kLatent + d] /= sum;
      result.lse[row] = top + std::log(sum);
    }
  }
  return result;
}

// ---------------------------------------------------------------------- on the GPU
Result decode(const Problem& problem, int num_sms) {
  using tvm::ffi::Function;
  const int64_t b = problem.batch;
  const int row_tiles = (kHeads + kTile - 1) / kTile;            // of 64 query rows
  const int64_t num_parts = std::max(1, num_sms / row_tiles);    // one CTA on each SM
  const int64_t slots = std::max<int64_t>(1, 2 * num_parts - 2);  // partial results that any batch can need

  Tensor q(kBf16, {b, 1, kHeads, kHeadDim}, problem.q);
  Tensor cache(kBf16, {problem.num_pages, kPage, 1, kHeadDim}, problem.cache);
  Tensor block_table(kI32, {b, problem.max_tiles}, problem.block_table);
  Tensor lengths(kI32, {b}, kLengths);
  Tensor items(kI32, {b + num_parts, kRecord}), parts(kI32, {num_parts, kPart}), merges(kI32, {1 + b, kMerge});
  Tensor out(kBf16, {b, 1, kHeads, kLatent}), lse(kF32, {b, kHeads, 1});
  Tensor o_split(kF16, {slots, 1, kHeads, kLatent}), lse_split(kF32, {slots, 1, kHeads});
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // the fills ran on the default stream

  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  TVMFFIEnvSetStream(kDLCUDA, 0, stream, nullptr);  // the objects launch on this thread's stream of their tensors' device
  Function::InvokeExternC(nullptr, flashmla_cute_schedule, lengths.view(), items.view(), parts.view(), merges.view(), row_tiles,
                          problem.max_tiles * kPage, problem.max_tiles * kPage);
  Function::InvokeExternC(nullptr, flashmla_cute_decode, q.view(), cache.view(), block_table.view(), items.view(), parts.view(),
                          merges.view(), out.view(), lse.view(), o_split.view(), lse_split.view(), kScale, num_sms,
                          nullptr, nullptr);  // no q of two parts, no sinks
  check(cudaStreamSynchronize(stream), "the kernels");
  TVMFFIEnvSetStream(kDLCUDA, 0, nullptr, nullptr);
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");

  Result result;
  for (uint16_t value : out.to_host<uint16_t>()) result.out.push_back(from_bf16(value));
  for (float value : lse.to_host<float>()) result.lse.push_back(value);
  return result;
}

bool agree(const Result& result, const Result& expected) {
  double difference = 0.0, norm = 0.0, gap = 0.0;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    difference += std::pow(result.out[i] - expected.out[i], 2);
    norm += std::pow(expected.out[i], 2);
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    if (result.lse[i] == expected.lse[i]) continue;  // -inf, of a request without tokens
    const double distance = std::abs(result.lse[i] - expected.lse[i]);
    gap = std::isnan(gap) || distance <= gap ? gap : distance;  // (a NaN stays)
  }
  const double rel = std::sqrt(difference / norm);
  std::printf("relative error of out %.1e (allowed %.0e), error of lse %.1e (allowed %.0e)\n", rel, kToleranceOut, gap,
              kToleranceLse);
  return rel <= kToleranceOut && gap <= kToleranceLse;  // (not for a NaN)
}

// Number of SMs of GPU 0; throws where the kernels cannot run.
int hopper_sms() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    throw std::runtime_error(std::string("no CUDA device: ") + cudaGetErrorString(status));
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (properties.major != 9 || properties.minor != 0) {
    throw std::runtime_error("the kernels are sm_90a code, the first CUDA device is " + std::string(properties.name));
  }
  return properties.multiProcessorCount;
}

}  // namespace

int main() {
  try {
    const int num_sms = hopper_sms();
    const Problem problem;
    const bool good = agree(decode(problem, num_sms), reference(problem));
    std::puts(good ? "agrees with double precision" : "does NOT agree with double precision");
    return good ? 0 : 1;
  } catch (const std::exception& error) {  // tvm::ffi::Error is one: a refused argument, a CUDA error
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
