// The connection to a sidecar. It begins with the first cache, so that programs without one never notice us. When the
// sidecar goes, all masks are taken off and nothing is taken any more; when one comes back, it is found again.

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"

#define RETRY_S 1
#define LARGEST_REQUEST (1u << 20)

static int reach(const char * name) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(name) + 1 > sizeof(to.sun_path)) {
        return -1;
    }
    memcpy(to.sun_path + 1, name, strlen(name));  // abstract: needs no folder, and vanishes with its owner
    const socklen_t length = (socklen_t) (offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct ucred peer;
    socklen_t    n = sizeof(peer);
    if (fd < 0 || connect(fd, (struct sockaddr *) &to, length) != 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) != 0 || (peer.uid != getuid() && peer.uid != 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

static bool whole(int fd, void * bytes, size_t n, bool out) {
    for (size_t done = 0; done < n;) {
        const ssize_t k = out ? send(fd, (char *) bytes + done, n - done, MSG_NOSIGNAL) : recv(fd, (char *) bytes + done, n - done, 0);
        if (k <= 0 && errno == EINTR && k < 0) {
            continue;
        }
        if (k <= 0) {
            return false;
        }
        done += (size_t) k;
    }
    return true;
}

static void answer_all(int fd) {
    int64_t capacity = 1 << 16;
    char *  reply    = malloc((size_t) capacity);
    char *  request  = malloc(LARGEST_REQUEST);
    uint32_t n;
    while (reply && request && whole(fd, &n, sizeof(n), false) && n <= LARGEST_REQUEST && whole(fd, request, n, false)) {
        int64_t told = psikv_serve(request, n, reply + 4, capacity - 4);
        while (told < 0 && reply) {
            capacity = -told + 4;
            free(reply);
            reply = malloc((size_t) capacity);
            told  = reply ? psikv_serve(request, n, reply + 4, capacity - 4) : 0;
        }
        n = (uint32_t) told;
        if (!reply) {
            break;
        }
        memcpy(reply, &n, sizeof(n));
        if (!whole(fd, reply, 4 + (size_t) told, true)) {
            break;
        }
    }
    free(reply);
    free(request);
}

static int connected = -1;

static void * keep_connected(void * name) {
    for (;; sleep(RETRY_S)) {
        const int fd = connected = reach(name);
        if (fd >= 0) {
            answer_all(fd);
            connected = -1;
            close(fd);
            agent_alone();
        }
    }
    return NULL;
}

// Else the sidecar would wait for answers of a program that has ended, as long as a child of it lives.
void socket_after_fork(void) { close(connected); }

void socket_start(void) {
    static bool  started;
    const char * name = getenv("PSIKV_SOCKET");
    if (!name || !name[0] || __atomic_exchange_n(&started, true, __ATOMIC_ACQ_REL)) {
        return;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the program's signals are the program's
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 512 << 10);
    pthread_t thread;
    char * kept = strdup(name);
    if (!kept || pthread_create(&thread, &attributes, keep_connected, kept) != 0) {
        agent_say("no thread can be started: this program is not governed");
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
