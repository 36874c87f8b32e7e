"""The server of the package xllamacpp, with the flags that llama-server has by default."""

import sys
import time

import xllamacpp

model, port, n_ctx = sys.argv[1:4]
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = int(n_ctx)
params.n_parallel = 4
params.kv_unified = True
params.cpuparams.n_threads = 1
params.hostnames = ["127.0.0.1"]
params.port = int(port)
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
