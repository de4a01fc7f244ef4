// Runs a package of AOTInductor whose layers are this project's kernels, without Python:
//   serve MODEL.pt2 SCHEMAS.txt LIBRARY.so N C H W
// Prints the shapes and sums of the outputs for a float32 image of the values 0, 1/1000, 2/1000 ...
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int count, char** words) {
  if (count != 8) {
    std::cerr << "usage: serve MODEL.pt2 SCHEMAS.txt LIBRARY.so N C H W\n";
    return 2;
  }
  // The operators as Python defines them; the library adds kernels to definitions that exist.
  torch::Library schemas(torch::Library::FRAGMENT, "opentrans_kernels", {}, __FILE__, __LINE__);
  std::ifstream file(words[2]);
  for (std::string line; std::getline(file, line);) schemas.def(line.c_str());
  // Lazily: its one symbol of Python is in a function that only Python calls.
  if (dlopen(words[3], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(words[1]);
  std::vector<int64_t> size;
  for (int i = 4; i < 8; ++i) size.push_back(std::atol(words[i]));
  const at::Tensor flat = at::arange(size[0] * size[1] * size[2] * size[3], at::kFloat);
  const c10::InferenceMode guard;
  for (const at::Tensor& y : model.run({flat.div(1000).view(size)}))
    std::cout << y.sizes() << ' ' << y.sum(at::kDouble).item<double>() << '\n';
}
