// A disk that can't be read any more ends in SIGBUS: there is no answer that would not be wrong. It is said whose disk
// it was, and then whatever would have happened without us happens.

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "blobs.h"

static struct sigaction before;

static void say_and_pass_on(int number, siginfo_t * info, void * context) {
    (void) context;
    if (region_of_address((uint64_t) (uintptr_t) info->si_addr) || blob_holds((uintptr_t) info->si_addr)) {
        static const char text[] = "psi-kv: parked context can't be read back from ";
        (void) !write(2, text, sizeof(text) - 1);
        (void) !write(2, agent.place, strlen(agent.place));
        (void) !write(2, ": the disk failed\n", 18);
    }
    sigaction(number, &before, NULL);  // the read is tried again, and ends there
}

void sigbus_install(void) {
    static bool installed;
    if (!__atomic_exchange_n(&installed, true, __ATOMIC_ACQ_REL)) {
        struct sigaction ours = {.sa_sigaction = say_and_pass_on, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigemptyset(&ours.sa_mask);
        sigaction(SIGBUS, &ours, &before);
    }
}
