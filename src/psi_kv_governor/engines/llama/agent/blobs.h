// Saved states that the program keeps (blobs.c).

#pragma once

#include "agent.h"

struct blob { uint32_t id; bool whole, parked, checkpoint, busy, doomed; uintptr_t base; uint64_t bytes, mapped; double used_s; };

void blob_expect(size_t bytes, uint32_t flags);         // this thread is about to allocate so much for a state
void blob_begun(const void * address);
void blob_whole(const void * address, size_t bytes);    // a state was written there
void blob_used(const void * address);                   // a state is being read from there
int  blobs_tell(struct blob * to, int most);
uint64_t blob_park(uint32_t id, bool kept, uint64_t * bytes_written);
void blobs_after_fork(void);
bool blob_holds(uintptr_t address);
void blobs_refuse(bool refuse);                         // new entries of a prompt cache
