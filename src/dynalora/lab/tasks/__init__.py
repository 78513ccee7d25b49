"""Tasks to train on and to measure: generated ones, multiple choice, word problems, classification, and others.

A task is named in one of four ways:

- a benchmark of [`benchmarks`][dynalora.evaluation.benchmarks], such as `arc_easy` or `gsm8k`; its rows come from the
  Hub, or from a folder of benchmarks' files;
- a task of reasoning-gym, such as `family_relationships`, with options of its generator behind a colon:
  `chain_sum:min_terms=2,max_terms=3`;
- files: `data/ARC-Easy` for `data/ARC-Easy.train.jsonl.gz` and `data/ARC-Easy.dev.jsonl.gz`, or a folder with
  `train.jsonl` and `test.jsonl`. Held out is the first there is of `dev` (or `validation`, `valid`) and `test`. Rows
  with `instruction` and `answer` are multiple choice as in LLM-Adapters; rows with `question` and an `answer` that ends
  in `#### 72` are word problems as in GSM8K; all others are prompts with responses, chats or plain text, as
  `dynalora finetune` reads them. Of a single file (`rows.jsonl`) a fifth is held out;
- trained on one thing and measured on others, as papers do: `TRAIN -> MEASURED + MEASURED`, with a name for tables and
  files in front if wanted: `commonsense = commonsense_union -> boolq + piqa`. TRAIN is any of the above, of which the
  training rows are taken; a group of benchmarks or `commonsense_union`; or whatever `dynalora finetune --data` reads (a
  data set of the Hub, a file or a folder with prompts and responses); several are joined by `+`. MEASURED is any of the
  above, of which the held-out questions are taken, or a group. Accuracy is the unweighted mean of the measured tasks'
  accuracies, which are each among the metrics. A question that is measured is not trained on; questions count as the
  same if they differ only in case and white space.

| kind | trained on | accuracy | loss |
|---|---|---|---|
| generated | the answer | the whole answer is the model's most likely one | of the answer, end of turn included |
| multiple choice | the right option's text | the likeliest option, per token, is the right one | of the right option |
| multiple choice, by generation | the row's response | the first keyword that is said is the right one | of it |
| code | the solution | the generated program passes the tests | of the solution |
| classification | the class | the likeliest class is the right one | of the right class, per text |
| marking | the answer's place in the passage | none; exact match and F1 instead | of start and end, per question |
| prompts with responses | the response | the whole response is the model's most likely one | of the response |
| others | the solution's text | the solution is right by the benchmark's metric, if that says so | of the solution |

Losses are negative log-likelihoods of the right answers in nats per token. They tell models apart long before their
accuracies do. Classification (GLUE) is for encoders with a classification head, marking (`squad_v2_spans`) for those
with a question-answering head, all others for causal language models, and what is neither compared by likelihood nor
code for encoder-decoders as well.
"""
