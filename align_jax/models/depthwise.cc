// Depthwise convolution of float32 maps [B, H, W, C] and its two gradients, called by XLA on CPUs.
//
// A vector holds neighbouring channels and all sums of an output stay in registers. Nothing is
// padded, dilated or copied: a tap that meets no pixel is left out.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N), aligned(4)));
};
template <>
struct Lanes<1> {
  typedef float type;
};
template <int N>
using Vec = typename Lanes<N>::type;

template <int N>
inline Vec<N> load(const float* from) {
  Vec<N> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <int N>
inline void store(float* to, Vec<N> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

struct Shape {
  int64_t images, height, width, out_height, out_width, channels;
  int64_t stride, top, left;  // top, left: zeros before the first row and column
};

// Calls fn.operator()<lanes>(image, first row, last row, first channel) until all rows and channels
// are done: few rows at a time, which stay in the cache from one channel to the next.
template <typename Fn>
void over_bands(int64_t images, int64_t rows, int64_t row_floats, int64_t channels, Fn fn) {
  constexpr int64_t kBandFloats = 32 * 1024;
  const int64_t band = std::max<int64_t>(1, kBandFloats / row_floats);
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t row = 0; row < rows; row += band) {
      const int64_t end = std::min(rows, row + band);
      int64_t c = 0;
      for (; c + 16 <= channels; c += 16) fn.template operator()<16>(image, row, end, c);
      for (; c + 8 <= channels; c += 8) fn.template operator()<8>(image, row, end, c);
      for (; c < channels; ++c) fn.template operator()<1>(image, row, end, c);
    }
  }
}

// The columns of an output row whose taps all meet pixels are [first, last): none of a row that
// is not `whole`, whose taps do not all lie between the first and the last line of the map.
template <int K>
struct Row {
  int64_t top, first, last;

  Row(const Shape& s, int64_t row) : top(row * s.stride - s.top), first(0), last(0) {
    const int64_t room = s.width + s.left - K;
    const bool whole = top >= 0 && top + K <= s.height && room >= 0;
    first = whole ? std::min(s.out_width, (s.left + s.stride - 1) / s.stride) : s.out_width;
    last = whole ? std::max(first, std::min(s.out_width, room / s.stride + 1)) : s.out_width;
  }
};

inline bool is_inside(int64_t row, int64_t column, int64_t height, int64_t width) {
  return row >= 0 && row < height && column >= 0 && column < width;
}

template <int N, int K>
struct Taps {
  Vec<N> of[K][K];

  Taps(const float* from, int64_t channels, bool flipped = false) {
    for (int r = 0; r < K; ++r) {
      for (int q = 0; q < K; ++q) {
        const int at = flipped ? K * K - 1 - (r * K + q) : r * K + q;
        of[r][q] = load<N>(from + at * channels);
      }
    }
  }
};

// y[row, column] = sum of x[row * stride - top + r, column * stride - left + q] * taps[r, q].
template <int N, int K>
void forward(const Shape& s, int64_t image, int64_t row, int64_t end, int64_t c, const float* x,
             const Taps<N, K>& taps, float* y) {
  x += image * s.height * s.width * s.channels + c;
  y += image * s.out_height * s.out_width * s.channels + c;
  for (; row < end; ++row) {
    const Row<K> line(s, row);
    const auto at_border = [&](int64_t column) {
      const int64_t left = column * s.stride - s.left;
      Vec<N> sum = {};
      for (int r = 0; r < K; ++r) {
        for (int q = 0; q < K; ++q) {
          if (is_inside(line.top + r, left + q, s.height, s.width)) {
            sum += taps.of[r][q] * load<N>(x + ((line.top + r) * s.width + left + q) * s.channels);
          }
        }
      }
      store<N>(y + (row * s.out_width + column) * s.channels, sum);
    };
    for (int64_t column = 0; column < line.first; ++column) at_border(column);
    for (int64_t column = line.first; column < line.last; ++column) {
      const float* window =
          x + (line.top * s.width + column * s.stride - s.left) * s.channels;
      Vec<N> sum = {};
#pragma GCC unroll 5
      for (int r = 0; r < K; ++r) {
#pragma GCC unroll 5
        for (int q = 0; q < K; ++q) {
          sum += taps.of[r][q] * load<N>(window + (r * s.width + q) * s.channels);
        }
      }
      store<N>(y + (row * s.out_width + column) * s.channels, sum);
    }
    for (int64_t column = line.last; column < s.out_width; ++column) at_border(column);
  }
}

// Of a convolution of stride 2, the gradient at every second pixel of a row: of those that tap
// (kRow, kColumn) meets first. dx[row, column] = sum of dy[y, x] * taps[r, q] over
// y * 2 - top + r == row and x * 2 - left + q == column.
template <int N, int K, int kRow, int kColumn>
void every_second(const Shape& s, int64_t row, const Taps<N, K>& taps, const float* dy,
                  float* dx) {
  constexpr int kRows = (K - kRow + 1) / 2, kColumns = (K - kColumn + 1) / 2;
  const int64_t bottom = (row + s.top - kRow) / 2;
  const bool whole = bottom - kRows + 1 >= 0 && bottom < s.out_height;
  for (int64_t column = (kColumn + s.left) % 2; column < s.width; column += 2) {
    const int64_t right = (column + s.left - kColumn) / 2;
    Vec<N> sum = {};
    if (whole && right - kColumns + 1 >= 0 && right < s.out_width) {
      const float* corner = dy + (bottom * s.out_width + right) * s.channels;
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kColumns; ++j) {
          sum += taps.of[kRow + 2 * i][kColumn + 2 * j] *
                 load<N>(corner - (i * s.out_width + j) * s.channels);
        }
      }
    } else {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          if (is_inside(bottom - i, right - j, s.out_height, s.out_width)) {
            sum += taps.of[kRow + 2 * i][kColumn + 2 * j] *
                   load<N>(dy + ((bottom - i) * s.out_width + right - j) * s.channels);
          }
        }
      }
    }
    store<N>(dx + (row * s.width + column) * s.channels, sum);
  }
}

template <int N, int K>
void backward_stride_2(const Shape& s, int64_t image, int64_t row, int64_t end, int64_t c,
                       const Taps<N, K>& taps, const float* dy, float* dx) {
  dy += image * s.out_height * s.out_width * s.channels + c;
  dx += image * s.height * s.width * s.channels + c;
  for (; row < end; ++row) {
    if ((row + s.top) % 2) {
      every_second<N, K, 1, 0>(s, row, taps, dy, dx);
      every_second<N, K, 1, 1>(s, row, taps, dy, dx);
    } else {
      every_second<N, K, 0, 0>(s, row, taps, dy, dx);
      every_second<N, K, 0, 1>(s, row, taps, dy, dx);
    }
  }
}

// Adds to dkernel[r, q] the sum of x[row * stride - top + r, column * stride - left + q] *
// dy[row, column].
template <int N, int K>
void by_kernel(const Shape& s, int64_t image, int64_t row, int64_t end, int64_t c, const float* x,
               const float* dy, float* dkernel) {
  x += image * s.height * s.width * s.channels + c;
  dy += image * s.out_height * s.out_width * s.channels + c;
  Taps<N, K> sums(dkernel + c, s.channels);
  for (; row < end; ++row) {
    const Row<K> line(s, row);
    const auto at_border = [&](int64_t column) {
      const int64_t left = column * s.stride - s.left;
      const Vec<N> g = load<N>(dy + (row * s.out_width + column) * s.channels);
#pragma GCC unroll 5
      for (int r = 0; r < K; ++r) {
#pragma GCC unroll 5
        for (int q = 0; q < K; ++q) {
          if (is_inside(line.top + r, left + q, s.height, s.width)) {
            sums.of[r][q] += g * load<N>(x + ((line.top + r) * s.width + left + q) * s.channels);
          }
        }
      }
    };
    for (int64_t column = 0; column < line.first; ++column) at_border(column);
    for (int64_t column = line.first; column < line.last; ++column) {
      const float* window =
          x + (line.top * s.width + column * s.stride - s.left) * s.channels;
      const Vec<N> g = load<N>(dy + (row * s.out_width + column) * s.channels);
#pragma GCC unroll 5
      for (int r = 0; r < K; ++r) {
#pragma GCC unroll 5
        for (int q = 0; q < K; ++q) {
          sums.of[r][q] += g * load<N>(window + (r * s.width + q) * s.channels);
        }
      }
    }
    for (int64_t column = line.last; column < s.out_width; ++column) at_border(column);
  }
  for (int r = 0; r < K; ++r) {
    for (int q = 0; q < K; ++q) store<N>(dkernel + (r * K + q) * s.channels + c, sums.of[r][q]);
  }
}

using Maps = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

Shape shape_of(const Maps& x, const Maps& y, int64_t stride, int64_t top, int64_t left) {
  const auto in = x.dimensions(), out = y.dimensions();
  return {in[0], in[1], in[2], out[1], out[2], in[3], stride, top, left};
}

// Calls fn.operator()<K>() for kernels of K x K.
template <typename Fn>
ffi::Error with_size(int64_t size, int64_t stride, Fn fn) {
  if (stride == 1 || stride == 2) {
    if (size == 3) return fn.template operator()<3>(), ffi::Error::Success();
    if (size == 5) return fn.template operator()<5>(), ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument("only kernels of 3 x 3 and 5 x 5 of stride 1 or 2");
}

ffi::Error Forward(Maps x, Maps kernel, Result y, int64_t stride, int64_t top, int64_t left) {
  const Shape s = shape_of(x, *y, stride, top, left);
  return with_size(kernel.dimensions()[0], stride, [&]<int K>() {
    over_bands(s.images, s.out_height, s.width * s.channels * s.stride, s.channels,
               [&]<int N>(int64_t image, int64_t row, int64_t end, int64_t c) {
                 const Taps<N, K> taps(kernel.typed_data() + c, s.channels);
                 forward<N, K>(s, image, row, end, c, x.typed_data(), taps, y->typed_data());
               });
  });
}

ffi::Error ByInput(Maps kernel, Maps dy, Result dx, int64_t stride, int64_t top, int64_t left) {
  const Shape s = shape_of(*dx, dy, stride, top, left);
  return with_size(kernel.dimensions()[0], stride, [&]<int K>() {
    // Of stride 1 it is a convolution of dy with the kernel turned around.
    const Shape turned = shape_of(dy, *dx, 1, K - 1 - top, K - 1 - left);
    over_bands(s.images, s.height, s.width * s.channels, s.channels,
               [&]<int N>(int64_t image, int64_t row, int64_t end, int64_t c) {
                 const float* from = kernel.typed_data() + c;
                 if (stride == 1) {
                   const Taps<N, K> taps(from, s.channels, /*flipped=*/true);
                   forward<N, K>(turned, image, row, end, c, dy.typed_data(), taps,
                                 dx->typed_data());
                 } else {
                   const Taps<N, K> taps(from, s.channels);
                   backward_stride_2<N, K>(s, image, row, end, c, taps, dy.typed_data(),
                                           dx->typed_data());
                 }
               });
  });
}

ffi::Error ByKernel(Maps x, Maps dy, Result dkernel, int64_t stride, int64_t top, int64_t left) {
  const Shape s = shape_of(x, dy, stride, top, left);
  std::memset(dkernel->untyped_data(), 0, dkernel->size_bytes());
  return with_size(dkernel->dimensions()[0], stride, [&]<int K>() {
    over_bands(s.images, s.out_height, s.width * s.channels * s.stride, s.channels,
               [&]<int N>(int64_t image, int64_t row, int64_t end, int64_t c) {
                 by_kernel<N, K>(s, image, row, end, c, x.typed_data(), dy.typed_data(),
                                 dkernel->typed_data());
               });
  });
}

}  // namespace

#define TWO_MAPS_TO_ONE          \
  ffi::Ffi::Bind()               \
      .Arg<Maps>()               \
      .Arg<Maps>()               \
      .Ret<Maps>()               \
      .Attr<int64_t>("stride")   \
      .Attr<int64_t>("top")      \
      .Attr<int64_t>("left")

XLA_FFI_DEFINE_HANDLER_SYMBOL(DepthwiseForward, Forward, TWO_MAPS_TO_ONE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DepthwiseByInput, ByInput, TWO_MAPS_TO_ONE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DepthwiseByKernel, ByKernel, TWO_MAPS_TO_ONE);
