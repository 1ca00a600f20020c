/* The threads of the OpenMP runtime that this process has: torch's, so that no second pool competes for the cores. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#include "lanes.h"

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static void (*gomp_barrier)(void);
static int (*thread_number)(void);
static int (*team_size)(void);

static void *found(const char *name) { return dlsym(RTLD_DEFAULT, name); }

/* Looks for the runtime. Returns 1, or 0: bodies run on one thread. */
int ne_start(void) {
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))found("GOMP_parallel");
    gomp_barrier = (void (*)(void))found("GOMP_barrier");
    thread_number = (int (*)(void))found("omp_get_thread_num");
    team_size = (int (*)(void))found("omp_get_num_threads");
    if (gomp_parallel && gomp_barrier && thread_number && team_size) return 1;
    gomp_parallel = NULL;
    return 0;
}

const char *ne_path(void) { return NE_PATH; }

typedef struct {
    ne_body body;
    void *data;
} call_t;

static void run(void *data) {
    call_t *call = data;
    call->body(call->data, thread_number(), team_size());
}

void ne_parallel(ne_body body, void *data, int threads) {
    if (threads <= 1 || !gomp_parallel) {
        body(data, 0, 1);
        return;
    }
    call_t call = {body, data};
    gomp_parallel(run, &call, (unsigned)threads, 0);
}

void ne_barrier(int threads) {
    if (threads > 1) gomp_barrier();
}
