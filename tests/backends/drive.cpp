// Runs one call of the kernels from a file to a file, so that they run outside of Python: emulated, or sanitized.
//
// Read: the kernel's number, struct Call, then for each of its tensors and pointers the bytes of its storage, −1 where it
// is null; fields of Call hold offsets into the storage. Written: the storages. Each has an allocation of its own.
#include <cstdio>
#include <cstdlib>

#include "call.h"

extern "C" {
int64_t swat_forward_workspace(const Call*), swat_backward_workspace(const Call*), swat_decode_workspace(const Call*);
void swat_forward(const Call*), swat_backward(const Call*), swat_decode(const Call*);
}
constexpr struct {
  int64_t (*workspace)(const Call*);
  void (*run)(const Call*);
} KERNELS[] = {
    {swat_forward_workspace, swat_forward}, {swat_backward_workspace, swat_backward}, {swat_decode_workspace, swat_decode}};

static void get(void* to, int64_t size) {
  if (fread(to, 1, size, stdin) != (size_t)size) exit(3);
}

int main() {
  int64_t kernel;
  static Call call;
  get(&kernel, sizeof kernel);
  get(&call, sizeof call);
  void* fields[] = {&call.q.data, &call.k.data, &call.v.data, &call.out.data, &call.grad.data, &call.dq.data, &call.dk.data,
                    &call.dv.data, &call.slopes, &call.logit_bias, &call.ids, &call.length, &call.per_head};
  std::vector<std::pair<char*, int64_t>> storages;
  for (void* field : fields) {
    int64_t size, offset;
    get(&size, sizeof size);
    std::memcpy(&offset, field, sizeof offset);
    char* storage = size < 0 ? nullptr : (char*)malloc(size);
    if (storage) get(storage, size);
    char* start = storage ? storage + offset : nullptr;
    std::memcpy(field, &start, sizeof start);
    if (storage) storages.push_back({storage, size});
  }
  call.workspace = (char*)malloc(KERNELS[kernel].workspace(&call));
  KERNELS[kernel].run(&call);
  for (auto [storage, size] : storages) fwrite(storage, 1, size, stdout), free(storage);
  free(call.workspace);
}
