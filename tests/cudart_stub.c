// A CUDA runtime whose device is the host's memory, with NVIDIA's prototypes: a launch copies at once.
// Compiled by tests/test_cudart.py. `stub_fail` makes the named call return an error, as CUDA would.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int cudaError_t;
typedef struct { void *dst; const void *src; size_t count; size_t after; } Node;
typedef struct { Node nodes[4096]; size_t count; } Graph;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };

static const char *failing = "";
static cudaError_t last_error;
size_t stub_graphs, stub_executables, stub_launches, stub_mode;
void *stub_stream;

void stub_fail(const char *name) { failing = name; }
cudaError_t stub_peek(void) { return last_error; }

static cudaError_t result(const char *name) {
  if (strcmp(name, failing) == 0) return last_error = 2;
  return 0;
}

cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = 0; return error; }
const char *cudaGetErrorName(cudaError_t error) { return error == 2 ? "cudaErrorMemoryAllocation" : "other"; }

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  size_t before = stub_mode;
  stub_mode = *mode;
  *mode = before;
  return result(__func__);
}

cudaError_t cudaGraphCreate(void **graph, unsigned int flags) {
  if (result(__func__) || flags) return 2;
  *graph = calloc(1, sizeof(Graph));
  stub_graphs++;
  return 0;
}

// A handle of a node is its number, from 1.
cudaError_t cudaGraphAddMemcpyNode1D(void **node, void *graph, void *const *dependencies, size_t count_dependencies,
                                     void *dst, const void *src, size_t count, enum cudaMemcpyKind kind) {
  Graph *all = graph;
  if (result(__func__) || kind != cudaMemcpyDeviceToHost || count_dependencies > 1) return 2;
  if (all->count == 4096) return 2;
  all->nodes[all->count] = (Node){dst, src, count, count_dependencies ? (size_t)dependencies[0] : 0};
  *node = (void *)++all->count;
  return 0;
}

cudaError_t cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  if (result(__func__) || flags) return 2;
  Graph *copy = malloc(sizeof(Graph));
  memcpy(copy, graph, sizeof(Graph));
  *executable = copy;
  stub_executables++;
  return 0;
}

cudaError_t cudaGraphLaunch(void *executable, void *stream) {
  Graph *all = executable;
  if (result(__func__)) return 2;
  for (size_t i = 0; i < all->count; i++) {
    if (all->nodes[i].after != i) return last_error = 1;  // not behind the one before it
    memcpy(all->nodes[i].dst, all->nodes[i].src, all->nodes[i].count);
  }
  stub_stream = stream;
  stub_launches++;
  return 0;
}

cudaError_t cudaGraphDestroy(void *graph) { free(graph); stub_graphs--; return result(__func__); }
cudaError_t cudaGraphExecDestroy(void *executable) { free(executable); stub_executables--; return result(__func__); }
