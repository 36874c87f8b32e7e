// A llama.cpp that is linked into an addon of node and calls itself by address: node static_addon.js ADDON MODEL
const fs = require('fs');
const [addon, model] = process.argv.slice(2);
const resident = () => Number(/VmRSS:\s+(\d+)/.exec(fs.readFileSync('/proc/self/status', 'utf8'))[1]);
const { LlamaContext } = require(addon);
const context = new LlamaContext({ model, n_ctx: 32768, n_threads: 1, n_batch: 64, n_gpu_layers: 0, use_mmap: true });
const at_start = resident();
context.completion({ prompt: 'The quick brown fox', n_predict: 12, top_k: 1, seed: 1, n_probs: 4 }).then((told) => {
  const probs = told.completion_probabilities.map((one) => one.probs.map((p) => [p.tok_str, p.prob]));
  console.log(JSON.stringify({ at_start, after: resident(), text: told.text, probs }));
  process.exit(0);
});
