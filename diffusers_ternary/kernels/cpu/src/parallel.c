// SPDX-License-Identifier: Apache-2.0
// A pool of threads that sleep between calls. dt_parallel returns when every part is done and nothing of a call outlives
// it, so a signal that Python handles afterward (Ctrl-C) finds no thread that still writes into the caller's memory.
// Threads are shared by all callers, and a caller works as well: it never waits for a thread that another call keeps
// busy. There are as many as the widest call needed.
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE  // pthread_setname_np
#endif
#include "ternary.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK dt_mutex;
typedef CONDITION_VARIABLE dt_condition;
#define MUTEX_START SRWLOCK_INIT
#define CONDITION_START CONDITION_VARIABLE_INIT
static void acquire(dt_mutex *mutex) { AcquireSRWLockExclusive(mutex); }
static void release(dt_mutex *mutex) { ReleaseSRWLockExclusive(mutex); }
static void wait_for(dt_condition *condition, dt_mutex *mutex) { SleepConditionVariableSRW(condition, mutex, INFINITE, 0); }
static void wake_all(dt_condition *condition) { WakeAllConditionVariable(condition); }
static void condition_build(dt_condition *condition) { InitializeConditionVariable(condition); }
static void condition_free(dt_condition *condition) { (void)condition; }
#else
#include <pthread.h>
#include <signal.h>
typedef pthread_mutex_t dt_mutex;
typedef pthread_cond_t dt_condition;
#define MUTEX_START PTHREAD_MUTEX_INITIALIZER
#define CONDITION_START PTHREAD_COND_INITIALIZER
static void acquire(dt_mutex *mutex) { pthread_mutex_lock(mutex); }
static void release(dt_mutex *mutex) { pthread_mutex_unlock(mutex); }
static void wait_for(dt_condition *condition, dt_mutex *mutex) { pthread_cond_wait(condition, mutex); }
static void wake_all(dt_condition *condition) { pthread_cond_broadcast(condition); }
static void condition_build(dt_condition *condition) { pthread_cond_init(condition, NULL); }
static void condition_free(dt_condition *condition) { pthread_cond_destroy(condition); }
#endif

// Lives on the stack of its caller.
typedef struct dt_job {
    void (*task)(void *context, int64_t part);
    void *context;
    int64_t parts, next, running;
    struct dt_job *following;
    dt_condition finished;
} dt_job;

// `mutex` guards everything here and in the jobs.
static dt_mutex mutex = MUTEX_START;
static dt_condition work = CONDITION_START;
static dt_job *jobs;  // those with parts that nobody has begun
static int64_t threads;

static void run_part(dt_job *job) {
    const int64_t part = job->next++;
    job->running++;
    if (job->next == job->parts) {
        dt_job **link = &jobs;
        while (*link != job) link = &(*link)->following;
        *link = job->following;
    }
    release(&mutex);
    job->task(job->context, part);
    acquire(&mutex);
    if (--job->running == 0 && job->next == job->parts) wake_all(&job->finished);
}

static void serve(void) {
    acquire(&mutex);
    for (;;) {
        while (!jobs) wait_for(&work, &mutex);
        run_part(jobs);
    }
}

#if defined(_WIN32)
static DWORD WINAPI thread_main(LPVOID unused) {
    (void)unused;
    serve();
    return 0;
}

static int start_thread(void) {
    HANDLE handle = CreateThread(NULL, 0, thread_main, NULL, 0, NULL);
    if (handle) CloseHandle(handle);
    return handle != NULL;
}
#else
static void *thread_main(void *unused) {
    (void)unused;
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "ternary");
#endif
    serve();
    return NULL;
}

static void before_fork(void) { acquire(&mutex); }
static void after_fork_parent(void) { release(&mutex); }

// Threads do not survive a fork, nor do the calls that other threads of the parent were in.
static void after_fork_child(void) {
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&work, NULL);
    jobs = NULL;
    threads = 0;
}

static int start_thread(void) {
    static int watches_forks;
    if (!watches_forks) watches_forks = pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0;
    if (!watches_forks) return 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of the host
    pthread_t thread;
    const int started = pthread_create(&thread, NULL, thread_main, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started) pthread_detach(thread);
    return started;
}
#endif

void dt_parallel(void (*task)(void *context, int64_t part), void *context, int64_t parts) {
    if (parts <= 1) {
        if (parts == 1) task(context, 0);
        return;
    }
    dt_job job = {.task = task, .context = context, .parts = parts};
    condition_build(&job.finished);
    acquire(&mutex);
    // Without a new thread (out of memory, a limit of the system) the others and the caller do its parts.
    while (threads < parts - 1 && start_thread()) threads++;
    dt_job **last = &jobs;
    while (*last) last = &(*last)->following;
    *last = &job;
    wake_all(&work);
    while (job.next < job.parts) run_part(&job);
    while (job.running) wait_for(&job.finished, &mutex);
    release(&mutex);
    condition_free(&job.finished);
}
