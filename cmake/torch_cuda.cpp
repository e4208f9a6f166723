// SPDX-License-Identifier: Apache-2.0
// Stands in for torch's libtorch_cuda.so while libdien_ops_cuda.so is linked: by its name, and by what we call in it. Never
// installed. Without it our library would not name the real one as needed, and the loader would not look there.

extern "C" __attribute__((visibility("default"))) void aoti_torch_get_current_cuda_stream() {}
