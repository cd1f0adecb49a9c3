/* A CUDA driver without a device, as far as conditional graphs need one.

   It records what is called, refuses what the real driver documents to refuse, and launches a graph
   by walking it: a setter reads its flag from host memory, an IF node walks its body where the
   handle's value is not zero, a child graph is handed to the caller of stub_on_child. */

#include <cuda.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 1024
#define CONTEXT ((CUcontext)0x900)
#define MODULE ((CUmodule)0x500)
#define SETTER ((CUfunction)0x510)

enum kind { CHILD, SET, IF };
struct graph;
struct handle { struct graph *graph; int nodes; unsigned value; };
struct node {
    enum kind kind;
    struct graph *in, *body;
    struct handle *handle;
    unsigned long long child, flag;
};
struct graph { int id, count, is_body; struct node *nodes[MOST]; };

static char text[1 << 20];
static size_t used;
static int graphs, modules, executables, version = 12040, fail_at;
static char failing[64];
static void (*on_child)(unsigned long long);

static void note(const char *format, ...) {
    va_list values;
    va_start(values, format);
    used += vsnprintf(text + used, sizeof text - used, format, values);
    va_end(values);
    used += snprintf(text + used, sizeof text - used, "\n");
}

/* what is wrong is named in the log: the error alone says little */
static CUresult refuse(const char *why) {
    note("refused %s", why);
    return CUDA_ERROR_INVALID_VALUE;
}

static int fails(const char *name) {
    return !strcmp(name, failing) && --fail_at == 0;
}
#define MAY_FAIL(name) if (fails(name)) return CUDA_ERROR_UNKNOWN

static struct graph *new_graph(int is_body) {
    static int ids;
    struct graph *graph = calloc(1, sizeof *graph);
    graph->id = ++ids;
    graph->is_body = is_body;
    return graph;
}

/* a node follows the last one of its graph, and nothing else: graphs are chains */
static CUresult add(
    struct graph *in, struct node made, const CUgraphNode *after, size_t count, CUgraphNode *out
) {
    struct node *last = in->count ? in->nodes[in->count - 1] : NULL;
    if (count != (last ? 1 : 0) || (last && after[0] != (CUgraphNode)last))
        return refuse("a node that does not follow the last one of its graph");
    struct node *node = malloc(sizeof *node);
    *node = made;
    node->in = in;
    in->nodes[in->count++] = node;
    *out = (CUgraphNode)node;
    return CUDA_SUCCESS;
}

static CUresult get_version(int *out) { MAY_FAIL("cuDriverGetVersion"); *out = version; return 0; }

static CUresult get_context(CUcontext *out) {
    MAY_FAIL("cuCtxGetCurrent");
    *out = CONTEXT;
    return CUDA_SUCCESS;
}

static CUresult load_module(CUmodule *out, const void *image) {
    MAY_FAIL("cuModuleLoadData");
    if (strncmp(image, ".version", 8)) return refuse("a module that is no PTX");
    note("module %zu", strlen(image));
    modules++;
    *out = MODULE;
    return CUDA_SUCCESS;
}

static CUresult unload_module(CUmodule module) {
    if (module != MODULE) return refuse("a module that is none");
    modules--;
    return CUDA_SUCCESS;
}

static CUresult get_function(CUfunction *out, CUmodule module, const char *name) {
    MAY_FAIL("cuModuleGetFunction");
    if (module != MODULE || strcmp(name, "eepass_set_condition")) return CUDA_ERROR_NOT_FOUND;
    *out = SETTER;
    return CUDA_SUCCESS;
}

static CUresult create_graph(CUgraph *out, unsigned flags) {
    MAY_FAIL("cuGraphCreate");
    if (flags) return refuse("flags of a graph");
    graphs++;
    *out = (CUgraph)new_graph(0);
    return CUDA_SUCCESS;
}

static CUresult destroy_graph(CUgraph graph) {
    if (((struct graph *)graph)->is_body) return refuse("a body is its node's to destroy");
    graphs--;
    return CUDA_SUCCESS;
}

static CUresult create_handle(
    CUgraphConditionalHandle *out, CUgraph graph, CUcontext context, unsigned value, unsigned flags
) {
    MAY_FAIL("cuGraphConditionalHandleCreate");
    if (context != CONTEXT || value || flags) return refuse("a handle's arguments");
    struct handle *handle = calloc(1, sizeof *handle);
    handle->graph = (struct graph *)graph;
    *out = (CUgraphConditionalHandle)handle;
    return CUDA_SUCCESS;
}

static CUresult add_kernel(
    CUgraphNode *out, CUgraph graph, const CUgraphNode *after, size_t count,
    const CUDA_KERNEL_NODE_PARAMS *p
) {
    MAY_FAIL("cuGraphAddKernelNode");
    if (p->func != SETTER || p->gridDimX != 1 || p->gridDimY != 1 || p->gridDimZ != 1 ||
        p->blockDimX != 1 || p->blockDimY != 1 || p->blockDimZ != 1 || p->sharedMemBytes ||
        p->extra || p->kern || p->ctx)
        return refuse("the setter's launch");
    struct handle *handle;
    struct node node = {SET};
    memcpy(&handle, p->kernelParams[0], 8);
    memcpy(&node.flag, p->kernelParams[1], 8);
    node.handle = handle;
    if (handle->graph != (struct graph *)graph) return refuse("a handle of another graph");
    note("set graph=%d flag=%llu", ((struct graph *)graph)->id, node.flag);
    return add((struct graph *)graph, node, after, count, out);
}

static CUresult add_child(
    CUgraphNode *out, CUgraph graph, const CUgraphNode *after, size_t count, CUgraph child
) {
    MAY_FAIL("cuGraphAddChildGraphNode");
    struct node node = {CHILD};
    node.child = (unsigned long long)child;
    note("child graph=%d child=%llu", ((struct graph *)graph)->id, node.child);
    return add((struct graph *)graph, node, after, count, out);
}

static CUresult add_node(
    CUgraphNode *out, CUgraph graph, const CUgraphNode *after, const CUgraphEdgeData *edges,
    size_t count, CUgraphNodeParams *p
) {
    MAY_FAIL("cuGraphAddNode");
    static const long long zeros[29];
    const CUDA_CONDITIONAL_NODE_PARAMS *c = &p->conditional;
    if (p->type != CU_GRAPH_NODE_TYPE_CONDITIONAL || c->type != CU_GRAPH_COND_TYPE_IF ||
        c->size != 1 || c->ctx != CONTEXT)
        return refuse("an IF node's parameters");
    if (edges && memcmp(edges, zeros, count * sizeof *edges)) return refuse("data of an edge");
    if (memcmp(p->reserved0, zeros, sizeof p->reserved0) || p->reserved2 ||
        memcmp(c + 1, zeros, sizeof p->reserved1 - sizeof *c))
        return refuse("reserved bytes that are not zero");
    struct node node = {IF};
    node.handle = (struct handle *)c->handle;
    if (node.handle->graph != (struct graph *)graph) return refuse("a handle of another graph");
    if (node.handle->nodes++) return refuse("a handle that has its node already");
    node.body = new_graph(1);
    note("if graph=%d body=%d", ((struct graph *)graph)->id, node.body->id);
    static CUgraph bodies[MOST];
    static int given;
    bodies[given] = (CUgraph)node.body;
    p->conditional.phGraph_out = &bodies[given++];
    return add((struct graph *)graph, node, after, count, out);
}

static CUresult instantiate(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    MAY_FAIL("cuGraphInstantiate");
    if (flags) return refuse("flags of an executable graph");
    note("instantiate graph=%d", ((struct graph *)graph)->id);
    executables++;
    *out = (CUgraphExec)graph;
    return CUDA_SUCCESS;
}

static CUresult destroy_executable(CUgraphExec executable) { executables--; return CUDA_SUCCESS; }

static CUresult upload(CUgraphExec executable, CUstream stream) {
    MAY_FAIL("cuGraphUpload");
    note("upload stream=%llu", (unsigned long long)stream);
    return CUDA_SUCCESS;
}

static void walk(struct graph *graph) {
    for (int index = 0; index < graph->count; index++) {
        struct node *node = graph->nodes[index];
        if (node->kind == CHILD) on_child(node->child);
        if (node->kind == SET) node->handle->value = *(unsigned char *)node->flag;
        if (node->kind == IF && node->handle->value) walk(node->body);
    }
}

static CUresult launch(CUgraphExec executable, CUstream stream) {
    MAY_FAIL("cuGraphLaunch");
    note("launch stream=%llu", (unsigned long long)stream);
    walk((struct graph *)executable);
    return CUDA_SUCCESS;
}

/* a name may stand for several signatures; ``since``: the version from which on it is this one */
static const struct { const char *name; int since; void *function; } TABLE[] = {
    {"cuDriverGetVersion", 2020, get_version}, {"cuCtxGetCurrent", 4000, get_context},
    {"cuModuleLoadData", 2000, load_module}, {"cuModuleUnload", 2000, unload_module},
    {"cuModuleGetFunction", 2000, get_function}, {"cuGraphCreate", 10000, create_graph},
    {"cuGraphDestroy", 10000, destroy_graph}, {"cuGraphAddKernelNode", 12000, add_kernel},
    {"cuGraphAddChildGraphNode", 10000, add_child}, {"cuGraphAddNode", 12030, add_node},
    {"cuGraphConditionalHandleCreate", 12030, create_handle},
    {"cuGraphInstantiateWithFlags", 11040, instantiate}, {"cuGraphUpload", 11010, upload},
    {"cuGraphExecDestroy", 10000, destroy_executable}, {"cuGraphLaunch", 10000, launch},
};

CUresult cuGetProcAddress_v2(
    const char *name, void **out, int since, cuuint64_t flags, CUdriverProcAddressQueryResult *how
) {
    *out = NULL;
    for (size_t index = 0; index < sizeof TABLE / sizeof *TABLE; index++)
        if (!strcmp(name, TABLE[index].name) && since == TABLE[index].since)
            *out = TABLE[index].function;
    if (how) *how = *out ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

const char *stub_log(void) { return text; }
void stub_clear(void) { used = 0; text[0] = 0; }
int stub_alive(void) { return graphs + modules + executables; }
void stub_on_child(void (*call)(unsigned long long)) { on_child = call; }

/* let the call number ``at`` of ``name`` from here on fail, once */
void stub_fail(const char *name, int at) {
    snprintf(failing, sizeof failing, "%s", name);
    fail_at = at;
}
