// Activations, layer norm, AdamW, softmax over a vocabulary, embeddings, dropout: chains of
// elementwise work, each in one pass over memory.

// The columns of a row, W at a time: body(column, lanes).
template <class T, class F> FA_INLINE void for_columns(index_t width, F&& body) {
  index_t c = 0;
  for (; c + W<T> <= width; c += W<T>) body(c, W<T>);
  if (c < width) body(c, int(width - c));
}
template <class T> FA_INLINE Vec<T> load_lanes(const T* p, int lanes) {
  return lanes == W<T> ? load(p) : load_n(p, lanes);
}
template <class T> FA_INLINE void store_lanes(T* p, Vec<T> v, int lanes) {
  if (lanes == W<T>)
    store(p, v);
  else
    store_n(p, v, lanes);
}
// Lanes n and above taken from `other`.
template <class T> FA_INLINE Vec<T> lanes_or(Vec<T> v, Vec<T> other, int n) {
  Vec<T> lane;
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) lane[i] = T(i);
  return lane < splat(T(n)) ? v : other;
}
template <class T> FA_INLINE Vec<T> lanes_below(Vec<T> v, int n) {
  return lanes_or<T>(v, Vec<T>{}, n);
}
template <class T> FA_INLINE Vec<T> square_root(Vec<T> x) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  else
    return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif FUSEDATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else
    return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  Vec<T> y;
  FA_UNROLL
  for (int i = 0; i < W<T>; i++)
    y[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(x[i]))) : T(__builtin_sqrt(double(x[i])));
  return y;
#endif
}
template <class T> FA_INLINE T* row_of(const Matrix& m, index_t r) {
  return reinterpret_cast<T*>(m.data + r * m.row);
}
template <class T> FA_INLINE Vec<T> magnitude(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x & ~(IntVec<T>)splat(T(-0.0)));
}
template <class T> FA_INLINE Vec<T> exp_of(Vec<T> x) {
  return exp2<T>(x * splat(T(LOG2E)));
}

// x, or the nearer end of [-20, 20], beyond which slopes are 0 or 1: keeps infinities out.
template <class T> FA_INLINE Vec<T> within_20(Vec<T> x) {
  const Vec<T> end = splat(T(20)), low = x < -end ? -end : x;
  return low > end ? end : low;
}

template <class T> struct Activated {
  Vec<T> y, slope;
};

// y = x Phi(x), slope Phi(x) + x phi(x). float32: Phi by formula 7.1.26 of Abramowitz and Stegun's
// Handbook of Mathematical Functions, |error| < 1e-7; float64: by the library's erf.
template <class T> FA_INLINE Activated<T> gelu(Vec<T> x) {
  const Vec<T> density = exp_of<T>(x * x * splat(T(-0.5)));
  Vec<T> cdf;
  if constexpr (sizeof(T) == 4) {
    const Vec<T> t = splat(T(1)) / fma<T>(magnitude<T>(x),
                                          splat(T(0.3275911 * 0.70710678118654752)), splat(T(1)));
    Vec<T> tail = splat(T(0.5 * 1.061405429));
    tail = fma<T>(tail, t, splat(T(0.5 * -1.453152027)));
    tail = fma<T>(tail, t, splat(T(0.5 * 1.421413741)));
    tail = fma<T>(tail, t, splat(T(0.5 * -0.284496736)));
    tail = fma<T>(tail, t, splat(T(0.5 * 0.254829592)));
    tail = tail * t * density;  // Phi(-|x|)
    cdf = x < splat(T(0)) ? tail : splat(T(1)) - tail;
  } else {
    for (int i = 0; i < W<T>; i++) cdf[i] = 0.5 * __builtin_erfc(-0.70710678118654752 * x[i]);
  }
  return {x * cdf, fma<T>(within_20<T>(x) * splat(T(0.3989422804014327)), density, cdf)};
}

// y = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), s the logistic function: the same as
// x (1 + tanh(u)) / 2.
template <class T> FA_INLINE Activated<T> gelu_tanh(Vec<T> x) {
  constexpr double c = 2 * 0.79788456080286536;
  const Vec<T> x2 = x * x;
  const Vec<T> u = x * fma<T>(x2, splat(T(c * 0.044715)), splat(T(c)));
  const Vec<T> e = exp_of<T>(-magnitude<T>(u));
  const Vec<T> larger = splat(T(1)) / (splat(T(1)) + e), smaller = e * larger;
  const Vec<T> s = u < splat(T(0)) ? smaller : larger;
  const Vec<T> z = within_20<T>(x), du = fma<T>(z * z, splat(T(3 * c * 0.044715)), splat(T(c)));
  return {x * s, fma<T>(z * du, larger * smaller, s)};
}

// max(x, 0); the slope at 0 is 0. NaN stays.
template <class T> FA_INLINE Activated<T> relu(Vec<T> x) {
  const Vec<T> zero{};
  return {x <= zero ? zero : x, x <= zero ? zero : splat(T(1))};
}

template <class T, class F>
FA_INLINE void activate(const Product& p, index_t i0, index_t rows, index_t j, index_t columns,
                        F&& f) {
  for (index_t i = i0; i < i0 + rows; i++) {
    T* y = row_of<T>(p.c, i) + j;
    T* slope = p.slope.data ? row_of<T>(p.slope, i) + j : nullptr;
    for_columns<T>(columns, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Activated<T> a = f(load_lanes(y + c, lanes));
      store_lanes(y + c, a.y, lanes);
      if (slope) store_lanes(slope + c, a.slope, lanes);
    });
  }
}

// Rows and columns of c that a product has just computed.
template <class T>
FA_NOINLINE void finish_tile(const Product& p, index_t i0, index_t rows, index_t j,
                             index_t columns) {
  switch (p.then) {
    case Then::nothing:
      break;
    case Then::relu:
      activate<T>(p, i0, rows, j, columns,
                  [](Vec<T> x) __attribute__((always_inline)) { return relu<T>(x); });
      break;
    case Then::gelu:
      activate<T>(p, i0, rows, j, columns,
                  [](Vec<T> x) __attribute__((always_inline)) { return gelu<T>(x); });
      break;
    case Then::gelu_tanh:
      activate<T>(p, i0, rows, j, columns,
                  [](Vec<T> x) __attribute__((always_inline)) { return gelu_tanh<T>(x); });
      break;
    case Then::times:
      for (index_t i = i0; i < i0 + rows; i++) {
        T* y = row_of<T>(p.c, i) + j;
        const T* slope = row_of<T>(p.slope, i) + j;
        for_columns<T>(columns, [&](index_t c, int lanes) __attribute__((always_inline)) {
          store_lanes(y + c, load_lanes(y + c, lanes) * load_lanes(slope + c, lanes), lanes);
        });
      }
  }
}

template <class T> static void activate_rows(const Product& p, index_t begin, index_t end) {
  finish_tile<T>(p, begin, end - begin, 0, p.n);
}

template <class T> static void layer_norm(const LayerNorm& n, index_t begin, index_t end) {
  const T *weight = static_cast<const T*>(n.weight), *bias = static_cast<const T*>(n.bias);
  const T share = T(1) / T(n.width);
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(n.x, r);
    T* y = row_of<T>(n.y, r);
    prefetch_near(row_of<const T>(n.x, r + 1));
    Vec<T> sum{};
    for_columns<T>(n.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      sum += load_lanes(x + c, lanes);
    });
    const T mean = sum_lanes<T>(sum) * share;
    Vec<T> squares{};
    for_columns<T>(n.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      // The lanes beyond the row must add nothing: splat(mean) is loaded with them.
      const Vec<T> d = lanes == W<T> ? load(x + c) - splat(mean)
                                     : lanes_below<T>(load_n(x + c, lanes) - splat(mean), lanes);
      squares = fma<T>(d, d, squares);
    });
    const T rstd = T(1) / T(__builtin_sqrt(sum_lanes<T>(squares) * share + T(n.eps)));
    static_cast<T*>(n.mean)[r] = mean;
    static_cast<T*>(n.rstd)[r] = rstd;
    for_columns<T>(n.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Vec<T> h = (load_lanes(x + c, lanes) - splat(mean)) * splat(rstd);
      store_lanes(y + c, fma<T>(h, load_lanes(weight + c, lanes), load_lanes(bias + c, lanes)),
                  lanes);
    });
  }
}

// With h = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - h mean(g h)).
template <class T>
static void layer_norm_backward(const LayerNormBackward& n, index_t begin, index_t end) {
  const T* weight = static_cast<const T*>(n.weight);
  T *dweight = static_cast<T*>(n.dweight), *dbias = static_cast<T*>(n.dbias);
  const T share = T(1) / T(n.width);
  for (index_t r = begin; r < end; r++) {
    const T *x = row_of<const T>(n.x, r), *dy = row_of<const T>(n.dy, r);
    T* dx = row_of<T>(n.dx, r);
    const Vec<T> mean = splat(static_cast<const T*>(n.mean)[r]);
    const T rstd = static_cast<const T*>(n.rstd)[r];
    Vec<T> sum{}, along{};
    for_columns<T>(n.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Vec<T> d = load_lanes(dy + c, lanes);
      const Vec<T> h = (load_lanes(x + c, lanes) - mean) * splat(rstd);
      const Vec<T> g = d * load_lanes(weight + c, lanes);  // 0 beyond the row
      sum += g;
      along = fma<T>(g, h, along);
      store_lanes(dweight + c, fma<T>(d, h, load_lanes(dweight + c, lanes)), lanes);
      store_lanes(dbias + c, load_lanes(dbias + c, lanes) + d, lanes);
    });
    const Vec<T> m1 = splat(T(sum_lanes<T>(sum) * share));
    const Vec<T> m2 = splat(T(sum_lanes<T>(along) * share));
    for_columns<T>(n.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Vec<T> h = (load_lanes(x + c, lanes) - mean) * splat(rstd);
      const Vec<T> g = load_lanes(dy + c, lanes) * load_lanes(weight + c, lanes);
      store_lanes(dx + c, splat(rstd) * (g - m1 - h * m2), lanes);
    });
  }
}

template <class T> static void adamw(const AdamW& a, index_t begin, index_t end) {
  T *p = static_cast<T*>(a.p) + begin, *m = static_cast<T*>(a.m) + begin,
    *v = static_cast<T*>(a.v) + begin;
  const T* g = static_cast<const T*>(a.g) + begin;
  const Vec<T> scale = splat(T(a.scale)), b1 = splat(T(a.b1)), b2 = splat(T(a.b2)),
               fresh1 = splat(T(1.0 - a.b1)), fresh2 = splat(T(1.0 - a.b2)),
               rate = splat(T(a.rate)), root = splat(T(a.root)), shrink = splat(T(a.shrink)),
               eps = splat(T(a.eps));
  for_columns<T>(end - begin, [&](index_t c, int lanes) __attribute__((always_inline)) {
    const Vec<T> gradient = load_lanes(g + c, lanes) * scale;
    const Vec<T> mean = fma<T>(load_lanes(m + c, lanes), b1, gradient * fresh1);
    const Vec<T> square = fma<T>(load_lanes(v + c, lanes), b2, gradient * gradient * fresh2);
    store_lanes(m + c, mean, lanes);
    store_lanes(v + c, square, lanes);
    const Vec<T> step = mean * rate / fma<T>(square_root<T>(square), root, eps);
    store_lanes(p + c, load_lanes(p + c, lanes) * shrink - step, lanes);
  });
}

template <class T> static void log_sum_exp(const Softmax& s, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(s.x, r);
    const Vec<T> lowest = splat(Bits<T>::lowest);
    Vec<T> max = lowest;
    for_columns<T>(s.classes, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Vec<T> v = load_lanes(x + c, lanes);
      max = max_or_second<T>(lanes == W<T> ? v : lanes_or<T>(v, lowest, lanes), max);
    });
    T most = max[0];
    for (int i = 1; i < W<T>; i++) most = max[i] > most ? max[i] : most;
    Vec<T> sum{};
    for_columns<T>(s.classes, [&](index_t c, int lanes) __attribute__((always_inline)) {
      const Vec<T> e = exp_of<T>(load_lanes(x + c, lanes) - splat(most));
      sum += lanes == W<T> ? e : lanes_below<T>(e, lanes);
    });
    const Vec<T> log2 = log2_positive<T>(splat(sum_lanes<T>(sum)));
    static_cast<T*>(s.lse)[r] = most + T(LN2) * log2[0];
  }
}

template <class T> static void softmax_gradient(const Softmax& s, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(s.x, r);
    T* dx = row_of<T>(s.dx, r);
    const Vec<T> lse = splat(static_cast<const T*>(s.lse)[r]);
    const Vec<T> share = splat(static_cast<const T*>(s.share)[r]);
    for_columns<T>(s.classes, [&](index_t c, int lanes) __attribute__((always_inline)) {
      store_lanes(dx + c, share * exp_of<T>(load_lanes(x + c, lanes) - lse), lanes);
    });
  }
}

template <class T> static void gather(const Gather& g, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* from[TABLES];
    int tables = 0;
    for (; tables < TABLES && g.tables[tables].data; tables++)
      from[tables] = row_of<const T>(g.tables[tables], g.ids[tables][r]);
    T* y = row_of<T>(g.y, r);
    for_columns<T>(g.width, [&](index_t c, int lanes) __attribute__((always_inline)) {
      Vec<T> sum = load_lanes(from[0] + c, lanes);
      for (int i = 1; i < tables; i++) sum += load_lanes(from[i] + c, lanes);
      store_lanes(y + c, sum, lanes);
    });
  }
}

// Rows are added 64 at a time, and those sums to each other: long chains lose digits.
template <class T> static void scatter(const Scatter& s, index_t n, index_t c0, index_t c1) {
  const index_t begin = s.first[n], end = s.first[n + 1];
  T* y = row_of<T>(s.y, s.rows[n]) + c0;
  for_columns<T>(c1 - c0, [&](index_t c, int lanes) __attribute__((always_inline)) {
    Vec<T> total{};
    for (index_t i = begin; i < end; i += 64) {
      Vec<T> sum = load_lanes(row_of<const T>(s.x, s.order[i]) + c0 + c, lanes);
      for (index_t j = i + 1; j < min_index(i + 64, end); j++)
        sum += load_lanes(row_of<const T>(s.x, s.order[j]) + c0 + c, lanes);
      total = i == begin ? sum : total + sum;
    }
    store_lanes(y + c, total, lanes);
  });
}

// The random word of element i is a hash of the seed and i, so that nothing need be kept: two
// rounds of multiply and xor-shift with the constants of MurmurHash3's finalizer (Appleby).
FA_INLINE uint32_t mixed(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

template <class T> static void drop_rows(const DropRows& d, index_t begin, index_t end) {
  const T scale = T(d.scale);
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(d.x, r);
    const T* added = d.added.data ? row_of<const T>(d.added, r) : nullptr;
    T* y = row_of<T>(d.y, r);
    // One key for each row, from all bits of the seed and of the row's number.
    const uint64_t row = uint64_t(r);
    uint32_t key = mixed(uint32_t(d.seed) ^ uint32_t(row));
    key = mixed(key + uint32_t(d.seed >> 32)) ^ uint32_t(row >> 32);
    for (index_t c = 0; c < d.width; c++) {
      const bool kept = mixed(mixed(uint32_t(c) + 0x9e3779b9u) ^ key) < d.threshold;
      const T v = kept ? x[c] * scale : T(0);
      y[c] = added ? v + added[c] : v;
    }
  }
}
