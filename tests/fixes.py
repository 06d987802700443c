"""Which test follows which fix that check_cluster.py prints, to the letter.

FOLLOWED names, for every function that builds problems, a test for each of them, in the order of
their lines. A word in brackets says instead why a fix cannot be followed in a test, or that there
is none of its own.
"""

from __future__ import annotations

ALONE, TOGETHER = "tests/peers/test_fixes.py", "tests/peers/test_fixes_together.py"
HOSTS, FIREWALLS = "tests/multihost/test_fixes.py", "tests/multihost/test_firewalls.py"
NETWORKS = "tests/multihost/test_networks.py"
CLUSTER = "tests/multihost/test_check_cluster.py"
CONFIG, MODEL = "tests/config/test_fixes.py", "tests/model/test_fixes.py"
TRAINING = "tests/training/test_fixes.py"
AT_START = "tests/training/test_fetched_data.py"

FILE = f"{ALONE}::test_the_fix_of_a_launch_file_leaves_nothing_to_fix"
GPUS = f"{ALONE}::test_the_fix_of_a_file_for_gpus_leaves_nothing_to_fix"
FILES = f"{ALONE}::test_the_fix_of_files_that_do_not_belong_together_makes_them_one_launch"
MISSING_FILE = (
    f"{ALONE}::test_the_fixes_of_a_file_that_is_missing_are_to_name_it_or_to_count_those_there_are"
)
WRITTEN = f"{ALONE}::test_the_fixes_of_files_to_write_let_them_be_written"
FOLDER = f"{ALONE}::test_the_fixes_of_a_folder_let_files_be_written"
TO_THE_CPU = f"{ALONE}::test_the_fixes_of_a_file_for_gpus_let_its_launch_train_on_the_cpu"
ENVIRONMENT = f"{ALONE}::test_the_fix_of_an_environment_makes_a_launch_of_it"
FLAGS = f"{ALONE}::test_the_fixes_of_flags_make_flags_that_are_taken"
DEVICE = f"{ALONE}::test_the_fixes_of_what_this_machine_has_not_let_the_check_pass"
PORT = f"{ALONE}::test_the_fixes_of_a_port_and_a_name_lead_to_the_main_machine"
ADDRESSES = f"{ALONE}::test_the_fixes_of_addresses_are_addresses_that_work"
SECRET = f"{ALONE}::test_the_fixes_of_a_secret_make_one_that_is_taken"
CHECKPOINTS = f"{ALONE}::test_the_fixes_of_checkpoints_that_do_not_fit_let_them_fit"

OPTION = f"{CONFIG}::test_the_fix_of_flags_makes_flags_that_are_taken"
OTHER_NAMES = (
    "tests/config/test_names_people_type.py::test_an_answer_says_what_does_it_and_that_is_taken"
)
NEEDED = f"{CONFIG}::test_the_fixes_of_what_is_missing_add_it"
RECIPE = f"{CONFIG}::test_the_fix_of_a_recipe_makes_one_that_is_taken"
UNREAD = f"{CONFIG}::test_the_fixes_of_a_recipe_that_cannot_be_read_name_those_that_can"
SIZES = f"{MODEL}::test_the_fix_of_sizes_makes_a_model"
FAMILY = f"{MODEL}::test_the_fix_of_a_family_is_another_one"
WHOLE = f"{MODEL}::test_the_fixes_of_a_folder_that_is_no_whole_model_are_one_that_is"
WORDS = f"{MODEL}::test_the_fix_of_other_words_is_the_models_own_tokenizer"
TEXT = f"{TRAINING}::test_the_fixes_of_a_text_are_to_prepare_it_or_no_dry_run"
AGAIN = f"{TRAINING}::test_the_fixes_of_flags_of_texts_leave_them_out_or_prepare_again"
BATCH = f"{TRAINING}::test_the_fix_of_a_batch_is_one_that_can_be_divided"

NUMBERS = f"{TOGETHER}::test_the_fixes_of_numbers_and_of_a_late_rank_bring_all_together"
COPIED = f"{TOGETHER}::test_the_fix_of_a_secret_is_the_file_of_the_others"
STRANGERS = f"{TOGETHER}::test_the_fix_of_what_no_rank_sends_is_to_let_only_ranks_in"

NAMES = f"{HOSTS}::test_the_fixes_of_a_name_give_it_an_address"
INTERFACE = f"{HOSTS}::test_the_fixes_of_an_interface_of_another_network_take_the_common_one"
OWNERSHIP = f"{HOSTS}::test_the_fixes_of_a_main_address_of_another_machine_lead_to_the_right_one"
OPENED = f"{FIREWALLS}::test_the_lines_for_each_firewall_open_it"
KEPT_OUT = f"{FIREWALLS}::test_the_firewall_of_the_documents_lets_the_peers_in_and_nobody_else"
RESUMED = (
    "tests/multiprocess/test_resume_exactly.py::test_a_killed_run_ends_like_one_that_was_not_killed"
)
FETCHED = "tests/peers/test_file_fetch.py::test"
HOST_FILES = "tests/multihost/test_file_exchange.py::test"
LORA = "tests/model/test_lora.py"
OTHER_KINDS = f"{LORA}::test_adapters_of_other_programs_of_any_kind_are_added_or_refused"
OF_LORA = "tests/config/test_lora.py"
LORA_FLAGS = f"{OF_LORA}::test_the_fixes_of_values_make_flags_that_are_taken"
PEFT = f"{OF_LORA}::test_without_peft_the_line_that_installs_it_is_given"
TARGETS = f"{LORA}::test_targets_that_name_nothing_are_refused_with_the_names_there_are"
OTHER_ADAPTERS = f"{LORA}::test_adapters_are_loaded_only_beside_the_base_and_with_the_rank_they_had"
DAMAGED = f"{LORA}::test_damaged_adapters_and_a_base_that_is_gone_are_named"
COMPILING = "tests/multiprocess/test_compile.py"
UNCOMPILED = f"{COMPILING}::test_without_a_compiler_on_is_refused_and_auto_trains"
TRITON = (
    "tests/training/test_compilation.py"
    "::test_without_triton_a_gpu_compiles_nothing_until_it_is_installed"
)
HEADERS = (
    "tests/model/test_compiling.py::test_a_machine_without_python_headers_is_told_what_to_install"
)
CARRIES = "(carries what another place has built)"

FOLLOWED = {
    "check_cluster:look_at_data": (
        f"{ALONE}::test_the_fix_of_a_text_is_a_command_that_prepares_it",
    ),
    "config.check:check": (FLAGS, FLAGS),
    "config.check:check_together": (FLAGS,),
    "config.launch:check": (FLAGS, FLAGS, FLAGS),
    "config.fields:_of_wrong_type": (OPTION,),
    "config.fields:require_above_0": (OPTION,),
    "config.fields:require_at_least": (OPTION, OPTION),
    "config.fields:require_between": (OPTION,),
    "config.fields:require_seconds": (OPTION,),
    "config.fields:_require_writable": (OPTION, OPTION, OPTION),
    "config.parser:parse": (OPTION,),
    "config.parser:_in_our_words": (OTHER_NAMES,),
    "config.parser:_refuse_unknown": (OPTION, OPTION),
    "config.parser:_parser": (NEEDED,),
    "config.parser:_recipe_as_flags": (RECIPE, RECIPE, RECIPE),
    "config.evaluation:require_evaluations": (OPTION, OPTION),
    "config.lora:check": (LORA_FLAGS, LORA_FLAGS, LORA_FLAGS, PEFT, LORA_FLAGS),
    "config.lora:_refuse_without_rank": (f"{OF_LORA}::test_options_of_lora_need_its_rank",),
    "config.sync:check": (OPTION, OPTION, OPTION),
    "config.sync:_refuse_options_of_rounds": (OPTION,),
    "config.sync:_check_rounds": (OPTION, OPTION, OPTION),
    "config.train:check": (NEEDED, *[OPTION] * 9),
    "config.train:check_together": (NEEDED, OPTION, OPTION, OPTION, OPTION),
    "config.yaml_file:read_yaml": (UNREAD, RECIPE, UNREAD, RECIPE, RECIPE),
    "config.yaml_file:_require_simple": (RECIPE,),
    "model.build:model_from_scratch": (SIZES,),
    "model.build:read_model": (WHOLE, WHOLE),
    "model.build:load_base": (f"{LORA}::test_adapters_are_no_base_for_others",),
    "model.build:new_model_config": (SIZES, SIZES),
    "model.document_mask:document_mask_for": (
        f"{MODEL}::test_the_fix_of_a_family_that_cannot_mask_documents_is_another_one",
    ),
    "model.dropout:add_dropout": (f"{MODEL}::test_the_fix_of_a_dropout_is_the_familys_own",),
    "model.fit:require_positions": (
        f"{MODEL}::test_the_fix_of_a_block_that_is_too_long_is_a_shorter_one",
    ),
    "model.fit:require_all_weights": (WHOLE,),
    "model.fit:require_same_words": (WORDS, WORDS),
    "model.fit:require_causal": (SIZES, SIZES, FAMILY),
    "model.fit:require_memory": (f"{MODEL}::test_the_fix_of_too_little_memory_is_a_smaller_model",),
    "model.lora:require_peft": (PEFT,),
    "model.lora:inject": (
        f"{LORA}::test_a_model_without_layers_to_adapt_is_refused_with_what_there_is",
    ),
    "model.lora:require_targets": (TARGETS,),
    "model.lora:base_of": (DAMAGED,),
    "model.lora:load_adapters": (OTHER_ADAPTERS, OTHER_ADAPTERS, OTHER_ADAPTERS),
    "model.lora:refuse_another_base": (DAMAGED, OTHER_ADAPTERS),
    "model.lora:saved_settings": (DAMAGED,),
    "model.lora:weights_in": (DAMAGED,),
    "model.lora:merged_by_peft": (OTHER_KINDS, OTHER_KINDS),
    "model.optimizer:build_optimizer": (
        f"{MODEL}::test_the_fix_of_muon_without_matrices_is_adamw",
    ),
    "model.sizes:sizes_asked_for": (FAMILY, SIZES, SIZES, SIZES, SIZES, SIZES),
    "model.sizes:text_part": (FAMILY, FAMILY),
    "model.sizes:require_tokens": (SIZES,),
    "model.sizes:require_sizes": (SIZES,),
    "training.job:open_found": (AGAIN,),
    "training.job:require_prepared": (TEXT,),
    "training.job:refuse_flags_of_texts": (AGAIN,),
    "training.fetched_data:refuse_others": (
        f"{TRAINING}::test_the_fix_of_other_data_is_a_copy_of_those_of_rank_0",
    ),
    "training.texts:refuse_missing_file": (TEXT,),
    "training.texts:refuse_different_texts": (
        "tests/training/test_texts.py"
        "::test_another_text_under_the_same_name_is_refused_and_moved_away_it_is_not_missed",
    ),
    "training.texts:require_common_folder": (
        "tests/training/test_texts.py"
        "::test_without_fetching_nothing_is_prepared_that_others_could_not_see",
    ),
    "training.texts:all_facts": (
        "tests/training/test_texts.py::test_the_fix_of_a_text_that_cannot_be_read_is_another_file",
    ),
    "training.fetching:refuse_too_much": (
        f"{AT_START}::test_more_than_10_gb_is_fetched_only_if_it_was_asked_for",
    ),
    "training.fetching:require_room": (
        "tests/multihost/test_fetched.py::test_the_fix_of_too_small_a_disk_is_more_room",
    ),
    "training.fetching:written": (
        f"{AT_START}::test_the_fix_of_what_cannot_be_written_is_another_folder",
    ),
    "training.fetched_model:refuse_files_in_the_way": (
        "tests/training/test_fetched_model.py"
        "::test_a_file_that_is_not_of_the_run_is_in_the_way_until_it_is_moved",
    ),
    "training.fetched_data:look_everywhere": (
        f"{AT_START}::test_the_fix_of_what_cannot_be_read_is_another_folder",
    ),
    "training.fetched_data:refuse_what_is_in_the_way": (
        f"{AT_START}::test_a_path_that_is_something_else_is_left_as_it_is_until_it_is_moved",
    ),
    "training.fetched_data:refuse_other_than_the_runs": (
        f"{AT_START}::test_data_prepared_since_give_way_to_those_of_the_run_that_goes_on",
    ),
    "training.fetched_data:refuse_two_versions": (
        f"{AT_START}::test_without_a_run_neither_of_two_that_were_fetched_is_thrown_away",
    ),
    "training.fetched_data:refuse_what_is_nowhere": (
        f"{AT_START}::test_an_elastic_launch_can_wait_for_the_machine_that_has_the_data",
    ),
    "training.fetched_data:refuse_to_replace": (
        f"{AT_START}::test_what_is_prepared_between_look_and_lock_is_not_replaced",
        f"{AT_START}::test_a_file_of_somebody_in_a_fetched_dataset_is_moved_before_that_is_replaced",
    ),
    "training.fetched_data:refuse_to_fetch": (f"{AT_START}::test_never_fetches_nothing",),
    "training.fetched_data:refuse_dry_run": (
        f"{AT_START}::test_a_dry_run_says_what_would_be_fetched_and_writes_nothing",
    ),
    "training.plan:plan_updates": (BATCH, BATCH),
    "training.plan:more_processes_than_blocks": (
        f"{TRAINING}::test_the_fixes_of_a_batch_with_fewer_blocks_than_processes_let_the_run_go_on",
    ),
    "peers.addresses:resolve": (NAMES,),
    "peers.addresses:judge_name": (ADDRESSES, NAMES),
    "peers.addresses:judge_public": (ADDRESSES, ADDRESSES),
    "peers.addresses:judge_reach": (PORT, OPENED, OPENED),
    "peers.addresses:judge_own_port": (
        f"{ALONE}::test_the_fixes_of_a_taken_port_name_its_owner_and_another_port",
    ),
    "peers.claims:_too_late": (NUMBERS,),
    "peers.claims:_other_size": (NUMBERS,),
    "peers.claims:_twice": (
        f"{CLUSTER}::test_two_machines_with_one_number_are_named_and_one_may_be_corrected",
    ),
    "peers.claims:check_rank": (NUMBERS,),
    "peers.cluster:_result_of_main": (
        f"{TOGETHER}::test_the_fix_of_a_bug_of_the_main_process_is_what_that_printed",
    ),
    "peers.file_fetch:_need_room": (
        f"{HOST_FILES}_too_small_a_disk_is_found_before_the_first_byte",
    ),
    "peers.file_fetch:_of_disk": (
        f"{HOST_FILES}_what_came_before_a_disk_was_full_stays_for_the_next_try",
    ),
    "peers.file_fetch:_check_hopes": (
        f"{FETCHED}_each_source_that_cannot_bring_a_file_is_named_with_its_reason",
        f"{FETCHED}_a_file_of_nobody_comes_once_somebody_has_it",
    ),
    "peers.file_fetch:_judge": (f"{FETCHED}_what_this_machine_loses_is_no_sources_fault",),
    "peers.file_fetch:_checked": (f"{FETCHED}_a_list_from_elsewhere_writes_nothing_outside",),
    "peers.findings:fine": (CARRIES,),
    "peers.findings:warning": (CARRIES,),
    "peers.findings:failure": (CARRIES,),
    "peers.findings:refusal": (CARRIES,),
    "peers.findings:failures": (CARRIES,),
    "peers.findings:as_sent_by": (STRANGERS,),
    "peers.findings:problems_of_peer": (CARRIES,),
    "peers.findings:findings_of_peer": (CARRIES,),
    "peers.join:_form_cluster": (DEVICE,),
    "peers.join:_start_process_group": (
        "(a link must break after all doors were tried and before gloo connects)",
        "(Accelerate 1.15 never finds another number than it is given; another may)",
    ),
    "peers.join:_precision": (DEVICE,),
    "peers.join:differences": (
        f"{TOGETHER}::test_the_fix_of_other_versions_installs_the_one_that_rank_0_has",
        f"{TOGETHER}::test_the_fixes_of_other_settings_make_them_alike",
    ),
    "peers.join:_own_accelerator_state": (
        "tests/peers/test_join.py::test_a_second_accelerator_in_one_process_is_refused",
    ),
    "peers.launch:_number": (ENVIRONMENT,),
    "peers.launch:_require_within": (ENVIRONMENT,),
    "peers.launch:_flag": (ENVIRONMENT,),
    "peers.launch:_refuse_other_ways": (ENVIRONMENT, ENVIRONMENT),
    "model.compiling:compiled_by": (UNCOMPILED,),  # the same words
    "model.compiling:require_compiler": (*(TRITON, UNCOMPILED, HEADERS),),
    "peers.launch:_compile": (ENVIRONMENT,),
    "peers.launch:_threads": (ENVIRONMENT,),
    "peers.launch:_from_launcher": (
        f"{ALONE}::test_the_fix_of_a_launch_that_shares_its_store_is_a_script_that_is_there",
    ),
    "peers.launch:_refuse_wrong_flags": (ENVIRONMENT,),
    "peers.launch:_refuse_strangers": (ENVIRONMENT, ENVIRONMENT, ENVIRONMENT),
    "peers.launch_files:judge_together": (FILES, FILES, MISSING_FILE),
    "peers.launch_files:_judge_keys": (FILE, FILE, FILE),
    "peers.launch_files:_judge_type": (FILE, FILE, FILE, FILE),
    "peers.launch_files:_judge_counts": (FILE, FILE, FILE),
    "peers.launch_files:_judge_main": (FILE, FILE, FILE),
    "peers.launch_files:_judge_devices": (GPUS, GPUS, GPUS),
    "peers.launch_files:_judge_precision": (FILE, FILE),
    "peers.launch_files:_judge_ignored": (FILE, FILE, FILE, FILE),
    "peers.launch_files:write_launch_files": (WRITTEN, WRITTEN, WRITTEN, FOLDER, FOLDER),
    "peers.launcher:refuse_gpu_file": (TO_THE_CPU,),
    "peers.launcher:refuse_parallelism": (TO_THE_CPU,),
    "peers.liveness:_loss": (RESUMED,),
    "peers.machine:judge_machine": (
        f"{ALONE}::test_the_fixes_of_a_full_disk_make_room_for_a_run",
        f"{ALONE}::test_the_fix_of_little_memory_is_that_others_leave_theirs",
        f"{ALONE}::test_the_fix_of_threads_leaves_one_core_for_each",
    ),
    "peers.machine:judge_checkpoints": (CHECKPOINTS, CHECKPOINTS),
    "peers.plausible:_implausible": (
        f"{TOGETHER}::test_the_fix_of_numbers_that_cannot_be_is_the_same",
    ),
    "peers.preflight:judge_alone": (
        f"{ALONE}::test_the_fix_of_a_launch_of_other_files_is_their_own",
    ),
    "peers.preflight:judge_clocks": (f"{TOGETHER}::test_the_fix_of_a_clock_sets_it_right",),
    "peers.preflight:judge_pythons": (
        f"{TOGETHER}::test_the_fix_of_another_python_names_the_one_to_use",
    ),
    "peers.rank_failure:explain": (
        RESUMED,
        f"{TOGETHER}::test_the_fixes_of_too_little_memory_need_less",
    ),
    "peers.reach:_nat": (
        f"{NETWORKS}::test_nat_is_explained_and_a_tunnel_through_one_udp_port_helps",
    ),
    "peers.reach:_black_hole": (
        f"{NETWORKS}::test_a_black_hole_is_named_and_its_fix_opens_the_way",
    ),
    "peers.reach:_closed": (
        INTERFACE,
        f"{TOGETHER}::test_the_fix_of_an_address_that_two_machines_have_is_one_of_its_own",
        f"{HOSTS}::test_the_fix_of_a_link_that_loses_packets_shows_when_it_is_mended",
        OPENED,
    ),
    "peers.rendezvous:_refuse_open_launcher": (
        f"{TOGETHER}::test_the_fixes_of_torchruns_open_launch_let_it_begin",
    ),
    "peers.rendezvous:rendezvous": (
        f"{TOGETHER}::test_the_fix_of_a_main_process_that_ended_is_to_see_what_it_printed",
    ),
    "peers.rendezvous:open_store": (
        f"{TOGETHER}::test_the_fix_of_another_program_at_the_main_port_is_a_free_one",
    ),
    "peers.rendezvous:_no_way_to_main": (
        f"{HOSTS}::test_the_fixes_of_a_main_address_that_does_not_lead_to_rank_0_let_all_meet",
        f"{HOSTS}::test_the_fix_of_a_main_machine_that_nobody_serves_is_to_start_it",
    ),
    "peers.rendezvous:_gather": (
        f"{TOGETHER}::test_the_fix_of_a_rank_that_falls_silent_is_to_start_all_again",
    ),
    "peers.rendezvous:_missing": (f"{TOGETHER}::test_the_fixes_of_a_missing_rank_let_all_meet",),
    "peers.rendezvous:_prove": (COPIED, COPIED),
    "peers.rendezvous:_verdict": (CARRIES,),
    "peers.routes:route_to": (f"{HOSTS}::test_the_fix_of_a_missing_route_is_one",),
    "peers.routes:address_of": (
        f"{ALONE}::test_the_fix_of_an_interface_that_is_not_there_is_to_choose_none",
    ),
    "peers.routes:_judge_interface": (INTERFACE,),
    "peers.routes:_judge_ownership": (OWNERSHIP, OWNERSHIP),
    "peers.sealing:open": (KEPT_OUT,),
    "peers.secret:read_secret": (SECRET, SECRET, SECRET),
    "peers.secret:verified": (KEPT_OUT,),
}
