"""What is typed wrongly after `train.py`, a kind in a line: see tests/test_bad_input.py."""

from __future__ import annotations

TRAIN = r"""
--depth=1 --model-type=gpt2 --config-overrides=n_head=0 -> n_head
--depth=1 --model-type=gpt2 --config-overrides=n_embd=0 -> n_embd
--depth=1 --model-type=gpt2 --config-overrides=n_layer=-1 -> n_layer
--depth=1 --model-type=gpt2 --config-overrides=n_layer=0 -> n_layer
--depth=1 --model-type=gpt2 --optimizer=muon --config-overrides=n_head=1,n_embd=1 -> none to train
--depth=1 --model-type=gpt2 --config-overrides=n_head=3 -> n_head
--depth=1 --model-type=gpt2 --config-overrides=n_head=1.5 -> n_head
--depth=1 --model-type=gpt2 --config-overrides=n_head=true -> n_head
--depth=1 --model-type=gpt2 --config-overrides=n_head=two -> n_head
--depth=1 --model-type=gpt2 --config-overrides=n_embd=1000000000 -> memory
--depth=1 --model-type=gpt2 --config-overrides=n_embd=99999999999999999999 -> n_embd
--depth=1 --model-type=gpt2 --config-overrides=n_layer=100000000 -> n_layer is 100000000
--depth=1 --model-type=gpt2 --config-overrides=n_inner=-5 -> or leave n_inner out
--depth=1 --model-type=gpt2 --config-overrides=n_inner=0 -> give n_inner a size of 1 or more
--depth=1 --model-type=gpt2 --config-overrides=n_head -> is not KEY=VALUE
--config-overrides== -> is not KEY=VALUE
--depth=1 --model-type=gpt2 --config-overrides=n_haed=2 -> n_head
--depth=1 --model-type=gpt2 --config-overrides=activation_function=foo -> foo
--config-overrides=dtype=foo -> foo
--config-overrides=dtype=float16 -> --mixed-precision bf16
--config-overrides=torch_dtype=float16 -> --mixed-precision bf16
--config-overrides=model_type=llama -> --model-type llama
--config-overrides=architectures=[LlamaForCausalLM] -> --model-type llama
--config-overrides=is_encoder_decoder=true -> a causal language model is trained
--config-overrides=add_cross_attention=true -> a causal language model is trained
--config-overrides=problem_type=regression -> a causal language model is trained
--depth=1 --model-type=gpt2 --config-overrides=n_layer=2,n_layer=3 -> n_layer is given twice
--model-type=gpt2 --config-overrides=n_layer=2,num_hidden_layers=3 -> is given twice
--config-overrides=pad_token_id=99999 -> pad_token_id is 99999, the vocabulary has
--config-overrides=pad_token_id=word -> give a number like 0
--model-type=qwen3 --config-overrides=pad_token_id=word -> give another value for pad_token_id
--config-overrides=bos_token_id=99999 -> bos_token_id is 99999, the vocabulary has
--config-overrides=eos_token_id=-1 -> eos_token_id is -1, the vocabulary has
--config-overrides=use_cache=maybe -> give true or false
--depth=1 --model-type=gpt2 --config-overrides=resid_pdrop=2 -> resid_pdrop
--depth=1 --model-type=gpt2 --config-overrides=resid_pdrop=nan -> resid_pdrop
--depth=1 --model-type=gpt2 --config-overrides=resid_pdrop=-1 -> resid_pdrop
--depth=1 --model-type=gpt2 --config-overrides=layer_norm_epsilon=nan -> layer_norm_epsilon
--depth=1 --model-type=gpt2 --config-overrides=layer_norm_epsilon=-1 -> layer_norm_epsilon
--config-overrides=initializer_range=-1 -> initializer_range
--config-overrides=initializer_range=nan -> initializer_range
--config-overrides=vocab_size=5 -> vocabulary of 5
--config-overrides=vocab_size=-1 -> vocab
--depth=1 --model-type=gpt2 --config-overrides=n_positions=4 -> at most 4
--depth=1 --model-type=gpt2 --config-overrides=n_positions=-4 -> n_positions
--config-overrides=eos_token_id=[[[ -> eos_token_id
--depth=1 --model-type=gpt2 "--config-overrides=n_head=$((1))" -> n_head
--config-overrides=n_layer=2 -> write num_hidden_layers=2, or take GPT-2 with --model-type gpt2
--config-overrides=resid_pdrop=0.1 -> take GPT-2 with --model-type gpt2
--config-overrides=num_hidden_layers=0 -> num_hidden_layers
--config-overrides=num_attention_heads=-1 -> num_attention_heads
--config-overrides=hidden_size=1000000000 -> memory
--config-overrides=num_attention_heads=4,num_key_value_heads=3 -> num_key_value_heads
--model-type=gpt2 --depth=1 --config-overrides=n_embd=33,n_head=2 -> n_head
--config-overrides=num_hiden_layers=2 -> num_hidden_layers
--depth=0 -> --depth is 0
--depth=-1 -> --depth is -1
--depth=99999 -> --depth is 99999
--depth=two -> --depth is 'two'
--depth=200 -> smaller with --depth
--depth=2 --config-overrides=hidden_size=0 -> hidden_size
--depth=2 --model-type=foo -> foo
--model-name=@/model --depth=2 -> one or the other
--model-type=foo -> foo
--model-type=gpt3 -> gpt2
--model-type=vit -> vit
--model-type=llama --config-overrides=hidden_size=0 -> hidden_size
--model-type=llama --config-overrides=num_attention_heads=0 -> num_attention_heads
--model-type=llama --config-overrides=num_key_value_heads=3 -> num_
--model-type=llama --config-overrides=hidden_act=foo -> foo
--model-type=llama --config-overrides=rope_theta=0,hidden_size=32,num_attention_heads=2 -> llama
--model-type=llama --config-overrides=hidden_size=31,num_attention_heads=4 -> num_
--model-name=@/nothing -> no such folder
--model-name=no-such-model-anywhere -> could not be loaded
--model-name=@/empty.txt -> no such folder
"--model-name=bad name!" -> could not be loaded
--model-name=@/folder -> could not be loaded
--model-name=@/LONG -> is too long
--model-name=@/model --model-type=gpt2 -> one or the other
--model-name=@/model_no_config -> config.json
--model-name=@/model_no_weights -> could not be loaded
--model-name=@/model_weights_cut -> could not be loaded
--model-name=@/model_weights_empty -> could not be loaded
--model-name=@/model_weights_garbage -> could not be loaded
--model-name=@/model_weights_head -> could not be loaded
--model-name=@/model_weights_header -> could not be loaded
--model-name=@/model_weights_folder -> could not be loaded
--model-name=@/model_pickle -> could not be loaded
--model-name=@/model_no_shard -> could not be loaded
--model-name=@/model_index_list -> could not be loaded
--model-name=@/model_list -> could not be loaded
--model-name=@/model_null -> could not be loaded
--model-name=@/model_number -> could not be loaded
--model-name=@/model_empty -> could not be loaded
--model-name=@/model_garbage -> could not be loaded
--model-name=@/model_deep -> could not be loaded
--model-name=@/model_nothing -> could not be loaded
--model-name=@/model_type_unknown -> could not be loaded
--model-name=@/model_type_number -> could not be loaded
--model-name=@/model_type_other -> could not be loaded
--model-name=@/model_type_seq2seq -> could not be loaded
--model-name=@/model_heads_zero -> n_head is 0
--model-name=@/model_heads_word -> could not be loaded
--model-name=@/model_layers_negative -> model_layers_negative
--model-name=@/model_layers_more -> model_layers_more
--model-name=@/model_width_other -> could not be loaded
--model-name=@/model_width_huge -> model_width_huge
--model-name=@/model_width_null -> could not be loaded
--model-name=@/model_activation -> could not be loaded
--model-name=@/model_remote_code -> could not be loaded
--epochs=nan -> --epochs is nan
--epochs=inf -> --epochs is inf
--epochs=-1 -> --epochs is -1
--epochs=1e308 -> --epochs is 1e+308
--epochs=many -> --epochs is 'many'
--max-steps=0 -> --max-steps is 0
--max-steps=1e3 -> --max-steps is '1e3'
--max-steps=99999999999999999999 -> --max-steps
--batch-size=0 -> --batch-size is 0
--batch-size=99999999999999 -> use 10000000 or less
--batch-size=1.5 -> --batch-size is '1.5'
--micro-batch-size=3 -> 3
--micro-batch-size=-1 -> --micro-batch-size is -1
--gradient-accumulation-steps=0 -> --gradient-accumulation-steps is 0
--gradient-accumulation-steps=5 --batch-size=8 -> accumulation
--learning-rate=nan -> --learning-rate is nan
--learning-rate=0 -> --learning-rate is 0
--learning-rate=1e400 -> --learning-rate is inf
--weight-decay=inf -> --weight-decay is inf
--weight-decay=nan -> --weight-decay is nan
--weight-decay=-1 -> --weight-decay is -1
--warmup-steps=-1 -> --warmup-steps is -1
--max-grad-norm=nan -> --max-grad-norm is nan
--lr-scheduler=foo -> unknown schedule 'foo'
--lr-scheduler=reduce_lr_on_plateau -> reduce_lr_on_plateau
--optimizer=adam -> did you mean adamw
--mixed-precision=fp8 -> --mixed-precision is 'fp8'
--mixed-precision=fp16 -> fp16 needs a GPU
--seed=99999999999999999999 -> --seed is
--seed=x -> --seed is 'x'
--sequence-length=1 -> --sequence-length is 1
--sequence-length=64 -> has blocks of 32 tokens
--eval-every=-1 -> --eval-every is -1
--eval-blocks=-1 -> --eval-blocks is -1
--keep-best -> --keep-best needs evaluations
--keep-checkpoints=0 -> --keep-checkpoints is 0
--log-every=0 -> --log-every is 0
--save-every=-5 -> --save-every is -5
--max-seconds=nan -> --max-seconds is nan
--max-seconds=0 -> --max-seconds is 0
--resume=@/nothing -> there is no such folder
--resume=auto --overwrite -> give one of them
--report-to=foo -> foo: no such tracker
--report-to=clearml -> clearml
--sample-prompt=$'a \udc80' -> --sample-prompt
--sync=foo -> choose from: auto, ddp, diloco
--sync=diloco --outer-lr=nan -> --outer-lr is nan
--sync=diloco --outer-momentum=1 -> --outer-momentum is 1
--sync=diloco --sync-every=0 -> --sync-every is 0
--sync=diloco --sync-every=4 --fragments=9 -> --fragments 9
--outer-lr=1 -> belongs to --sync diloco
--compress=zip -> --compress is 'zip'
--compress=int8 --powersgd-rank=2 -> --powersgd-rank
--backend=mpi -> --backend is 'mpi'
--backend=nccl -> needs an NVIDIA GPU
--peer-timeout=0 -> --peer-timeout is 0
--peer-timeout=nan -> --peer-timeout is nan
--cpu-threads=-1 -> --cpu-threads is -1
--cpu-threads=99999999999 -> --cpu-threads
--rank=0 -> a launch by hand needs all of
BY_HAND --rank=2 -> --rank 2 is not one of
BY_HAND --master-port=99999 -> --master-port is 99999
BY_HAND --master-port=-1 -> --master-port is -1
BY_HAND --master-addr=no.such.host.invalid -> no.such.host
BY_HAND --master-addr=a..b -> a..b
BY_HAND --master-addr= -> --master-addr
BY_HAND --cluster-secret-file=@/folder.secret -> @/folder.secret
BY_HAND --cluster-secret-file=@/short.secret -> @/short.secret
BY_HAND --cluster-secret-file=@/empty.secret -> @/empty.secret
BY_HAND --cluster-secret-file=@/open.secret -> @/open.secret
--world-size=0 -> --world-size is 0
BY_HAND --cluster-secret-file=@/nothing -> @/nothing
--config=@/nothing.yaml -> no such file
--config=@/folder.yaml -> folder.yaml
--config=@/bomb.yaml -> bomb.yaml
--config=@/list.yaml -> holds a list
--config=@/number.yaml -> holds a int
--config=@/word.yaml -> holds a str
--config=@/tabs.yaml -> is not YAML
--config=@/unclosed.yaml -> is not YAML
--config=@/deep.yaml -> deep.yaml
--config=@/latin.yaml -> is not YAML
--config=@/nul.yaml -> is not YAML
--config=@/object.yaml -> is not YAML
--config=@/unknown.yaml -> did you mean batch_size
--config=@/list_value.yaml -> holds a list
--config=@/word_value.yaml -> --batch-size is 'many'
--config=@/date_value.yaml -> --seed is '2020-01-01'
--config=@/nested.yaml -> holds keys of its own
--config=@/nan.yaml -> --learning-rate is
--config=@/complex_key.yaml -> complex_key.yaml
--config=@/itself.yaml -> holds keys of its own
--config=@/documents.yaml -> is not YAML
--config=@/huge.yaml -> huge.yaml
--config=@/huge_number.yaml -> huge_number.yaml
--config=@/config_in_config.yaml -> unknown key 'config'
--config=@/pipe.yaml -> pipe.yaml
--config=/dev/zero -> /dev/zero
--config=@/loop -> loop
"--config=" -> --config is empty
--dataset-path= -> no data given
--dataset-path=@/nothing -> no such folder
--dataset-path=@/nothing.txt -> no such file
--dataset-path=@/shrt.txt -> did you mean @/short.txt?
--dataset-path=@/folder -> is not a prepared dataset
--dataset-path=@/empty.txt -> empty.txt
--dataset-path=@/blank.txt -> the text is too short
--dataset-path=@/short.txt -> the text is too short
--dataset-path=@/latin.txt -> UTF-8
--dataset-path=@/utf16.txt -> UTF-8
--dataset-path=@/bytes.txt -> UTF-8
--dataset-path=@/pipe.txt -> pipe.txt
--dataset-path=/dev/zero -> /dev/zero
--dataset-path=@/loop -> loop
--dataset-path=@/dangling.txt -> dangling.txt
--dataset-path=@/book.pdf -> is not text
--dataset-path=@/short.txt --dry-run -> --dry-run writes nothing
--dataset-path=@/latin.txt --encoding-errors=replace --vocab-size=3 -> --vocab-size is 3
--dataset-path=@/data_no_manifest -> found no manifest.json
--dataset-path=@/data_manifest_null -> manifest
--dataset-path=@/data_manifest_list -> manifest
--dataset-path=@/data_manifest_empty -> manifest
--dataset-path=@/data_manifest_garbage -> manifest
--dataset-path=@/data_manifest_deep -> manifest
--dataset-path=@/data_manifest_surrogate -> manifest
--dataset-path=@/data_manifest_nan -> manifest
--dataset-path=@/data_future -> format version 99
--dataset-path=@/data_version_word -> format version
--dataset-path=@/data_version_list -> format version
--dataset-path=@/data_no_splits -> manifest
--dataset-path=@/data_splits_list -> manifest
--dataset-path=@/data_splits_absent -> manifest
--dataset-path=@/data_split_word -> manifest
--dataset-path=@/data_split_empty -> manifest
--dataset-path=@/data_blocks_other -> promises 5
--dataset-path=@/data_length_zero -> sequence_length
--dataset-path=@/data_length_negative -> sequence_length
--dataset-path=@/data_length_word -> sequence_length
--dataset-path=@/data_length_other -> data_length_other
--dataset-path=@/data_length_huge -> data_length_huge
--dataset-path=@/data_vocabulary_zero -> vocab_size
--dataset-path=@/data_vocabulary_huge -> vocab
--dataset-path=@/data_vocabulary_word -> vocab_size
--dataset-path=@/data_vocabulary_small -> vocab
--dataset-path=@/data_eos_beyond -> manifest
--dataset-path=@/data_eos_none -> eos_token_id
--dataset-path=@/data_dtype_other -> dtype
--dataset-path=@/data_skipped_null -> skipped_rows
--dataset-path=@/data_fingerprint_null -> content_fingerprint
--dataset-path=@/data_files_null -> files
--dataset-path=@/data_files_none -> names no files
--dataset-path=@/data_manifest_changed -> was changed after it was written
--dataset-path=@/data_manifest_spaced -> was changed after it was written
--dataset-path=@/data_field_more -> manifest
--dataset-path=@/data_field_absent -> manifest
--dataset-path=@/data_arguments_list -> arguments
--dataset-path=@/data_no_train -> cannot be read
--dataset-path=@/data_no_state -> cannot be read
--dataset-path=@/data_state_list -> cannot be read
--dataset-path=@/data_info_list -> cannot be read
--dataset-path=@/data_arrow_cut -> cannot be read
--dataset-path=@/data_arrow_empty -> cannot be read
--dataset-path=@/data_arrow_garbage -> cannot be read
--dataset-path=@/data_arrow_no_arrow -> cannot be read
--dataset-path=@/data_arrow_other_type -> data_arrow_other_type
--dataset-path=@/data_arrow_other_column -> data_arrow_other_column
--dataset-path=@/data_arrow_beyond -> vocabulary
--dataset-path=@/data_no_tokenizer -> tokenizer
--dataset-path=@/data_tokenizer_empty -> tokenizer
--dataset-path=@/data_tokenizer_list -> tokenizer
--dataset-path=@/data_tokenizer_garbage -> tokenizer
--dataset-path=@/data_tokenizer_nothing -> tokenizer
--dataset-path=@/data_tokenizer_deep -> tokenizer
--dataset-path=@/data_tokenizer_model_odd -> tokenizer
"--output-dir=" -> no place for the run
--output-dir=@/empty.txt -> empty.txt
--output-dir=@/empty.txt/run -> empty.txt
--output-dir=@/loop -> loop
--output-dir=@/pipe.txt -> pipe.txt
--output-dir=/dev/null/run -> /dev/null
--output-dir=@/LONG -> is too long
$'--output-dir=@/\udc80' -> --output-dir
$'--output-dir=@/a\x00b' -> holds a NUL character
--output-dir=/proc/run -> /proc/run
--eval-only -> nothing to evaluate
--eval-only --model-name=@/model_weights_cut -> could not be loaded
--foo -> unknown argument --foo
--learning-rat=1 -> did you mean
word -> belong to no flag
--batch-size -> --batch-size: expected one argument
--epochs --batch-size=0 -> --epochs
--compile=perhaps -> --compile is 'perhaps'
--output_dir -> --output-dir: expected one argument
-x -> -x
RANK=a WORLD_SIZE=2 -> RANK is 'a'
RANK=-1 WORLD_SIZE=2 -> RANK is '-1'
RANK=2 WORLD_SIZE=2 -> this is rank 2 of a launch of 2 processes
RANK=0 WORLD_SIZE=x -> WORLD_SIZE is 'x'
RANK=0 WORLD_SIZE=0 -> WORLD_SIZE
RANK=0 WORLD_SIZE=-2 -> WORLD_SIZE is '-2'
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=x -> LOCAL_WORLD_SIZE is 'x'
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0 -> LOCAL_WORLD_SIZE
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3 -> LOCAL_WORLD_SIZE
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=x -> LOCAL_RANK is 'x'
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=99999 -> MASTER_PORT
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=x -> MASTER_PORT is 'x'
RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=0 -> MASTER_PORT
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a..b MASTER_PORT=29500 -> a..b
RANK=0 WORLD_SIZE=9999999999999999999999 -> WORLD_SIZE
RANK=² WORLD_SIZE=2 -> RANK is '²'
WORLD_SIZE=2 -> RANK is not set
MASTER_ADDR=10.0.0.1 -> RANK is not
OMPI_COMM_WORLD_SIZE=2 -> MPI
HF_HOME=/dev/null -> HF_HOME is /dev/null
HF_HOME=@/empty.txt/hub -> empty.txt is no folder
--tokenizer=gpt2 -> --tokenizer gpt2 is for a text file
--vocab-size=999 -> --vocab-size 999 is for a text file
OMP_NUM_THREADS=abc -> OMP_NUM_THREADS is 'abc'
OMP_NUM_THREADS=² -> OMP_NUM_THREADS
OMP_NUM_THREADS=99999999999 -> OMP_NUM_THREADS
ACCELERATE_MIXED_PRECISION=foo -> foo
ACCELERATE_MIXED_PRECISION=fp8 -> fp8
ACCELERATE_USE_CPU=maybe -> ACCELERATE_USE_CPU is 'maybe'
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=x -> ACCELERATE_GRADIENT_ACCUMULATION_STEPS
ACCELERATE_DYNAMO_BACKEND=foo -> ACCELERATE_DYNAMO_BACKEND
ACCELERATE_DYNAMO_BACKEND=EAGER ACCELERATE_DYNAMO_MODE=foo -> ACCELERATE_DYNAMO_MODE
ACCELERATE_DEBUG_MODE=maybe -> ACCELERATE_DEBUG_MODE
ACCELERATE_TORCH_DEVICE=foo -> foo
ACCELERATE_USE_FSDP=true -> FSDP
ACCELERATE_USE_DEEPSPEED=true -> DeepSpeed
ACCELERATE_USE_MEGATRON_LM=true -> Megatron
TORCHELASTIC_MAX_RESTARTS=3 TORCHELASTIC_USE_AGENT_STORE=True RANK=0 WORLD_SIZE=2 -> restarts
"""
