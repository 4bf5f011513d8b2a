// The same bits on every CPU with fused multiply-add: a hash of each case's results.
#pragma once

#include <string>

namespace fusedattn::test {

// Prints "case instruction-set hash" for the sets that promise each other's bits and run here.
void print_bits();
// Compares those sets with each other and with the hashes of a file; prints the cases in which one
// differs and returns how many differ.
int check_bits(const std::string& path);
// Writes the file, of the cases in which the sets that run here agree; returns in how many they do
// not.
int write_bits(const std::string& path);

}  // namespace fusedattn::test
