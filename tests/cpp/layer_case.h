// Calls of the layers' functions that the tests and the hashes of bits are made of.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "numbers.h"

namespace fusedattn::test {

// One call, in float32 or float64, by the kernels of the instruction set in use; and what it should
// give, by plain loops in double precision.
struct LayerCase {
  std::string name;
  std::function<Results(const Run&)> computed;
  std::function<Results()> expected;
};

std::vector<LayerCase> product_cases();      // products, and activations alone
std::vector<LayerCase> elementwise_cases();  // layer norm, AdamW, softmax
std::vector<LayerCase> row_cases();          // embeddings, dropout
std::vector<LayerCase> layer_cases();        // all of them

// `computed` is a lambda with the element type as its template argument.
template <class F, class G> LayerCase layer_case(std::string name, F computed, G expected) {
  return {std::move(name),
          [=](const Run& run) {
            return run.dtype == DType::float64 ? computed.template operator()<double>(run)
                                               : computed.template operator()<float>(run);
          },
          expected};
}

// Widths of rows that end before, at and after a register of any instruction set; and how many
// rows: once more than a partial sum of layer norm's backward has.
inline constexpr index_t LAYER_WIDTHS[] = {1, 3, 8, 17, 64, 100, 384};
inline std::string size_text(index_t rows, index_t width) {
  return std::to_string(rows).append("x").append(std::to_string(width));
}
inline index_t rows_for(index_t width) {
  return width == 100 ? 131 : 5;
}

// Rows with a gap between them, so that a stride that is taken for the width is noticed.
template <class T> class Array {
 public:
  Array(index_t rows, index_t cols, const Numbers& values = {})
      : cols_(cols), data_(std::size_t(rows * (cols + GAP))) {
    for (std::size_t i = 0; i < values.size(); i++) at(index_t(i)) = T(values[i]);
  }
  Matrix matrix() { return {reinterpret_cast<char*>(data_.data()), (cols_ + GAP) * SIZE, SIZE}; }
  Matrix transposed() {
    return {reinterpret_cast<char*>(data_.data()), SIZE, (cols_ + GAP) * SIZE};
  }
  Numbers numbers() {
    const index_t n = index_t(data_.size()) / (cols_ + GAP) * cols_;
    Numbers x;
    for (index_t i = 0; i < n; i++) x.push_back(double(at(i)));
    return x;
  }

 private:
  static constexpr index_t GAP = 3, SIZE = sizeof(T);
  T& at(index_t i) { return data_[std::size_t(i / cols_ * (cols_ + GAP) + i % cols_)]; }

  index_t cols_;
  std::vector<T> data_;
};

}  // namespace fusedattn::test
