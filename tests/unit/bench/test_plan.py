"""Which cases the benchmark has, in which order."""

from collections import Counter

from bench.plan import ALL_GROUPS, DATABASES, QUICK, Extent, load_processes_of, make_plan


def test_the_zero_time_group_has_every_system_with_every_workload_and_number_of_callers() -> None:
    zero = make_plan(Extent())[0]
    of_all = [(case.system, case.workload, case.callers) for case in zero.cases if case.system != "infer"]
    assert len(set(of_all)) == len(of_all) == 4 * 2 * 4


def test_the_open_inference_protocol_is_measured_with_64_callers_or_as_many_as_are_asked_for() -> None:
    for callers, measured in (((1, 64, 256), 64), ((1, 16), 16)):
        cases = [case for case in make_plan(Extent(callers=callers))[0].cases if case.system == "infer"]
        assert [(case.workload, case.callers) for case in cases] == [("S1", measured)]


def test_each_round_has_every_case_once_in_an_order_of_its_own() -> None:
    zero = make_plan(Extent(rounds=3))[0]
    order = list(zero.in_order())
    rounds = [[case for number, case in order if number == wanted] for wanted in (1, 2, 3)]
    assert len(order) == 3 * len(zero.cases)
    assert all(Counter(one) == Counter(zero.cases) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert order == list(zero.in_order())


def test_a_native_stream_has_one_load_process_and_no_other_system_has_more_than_callers() -> None:
    extent = Extent(load_processes=4)
    assert load_processes_of("stream", 64, extent) == 1
    assert load_processes_of("unary", 64, extent) == 4
    assert load_processes_of("unary", 1, extent) == 1


def test_as_many_calls_begin_while_the_model_takes_its_time_as_are_to_be_held_open() -> None:
    [held] = make_plan(Extent(groups=["held"], held_calls=10_000, held_latency_s=5.0))
    assert held.cases[0].rate_per_s == 2_000
    assert held.setting.max_in_flight == 0


def test_groups_are_chosen_by_name_and_the_full_run_is_much_longer_than_the_quick_one() -> None:
    assert [group.name for group in make_plan(Extent())] == list(ALL_GROUPS)
    assert [group.name for group in make_plan(Extent(groups=["held", "slot"]))] == ["slot", "held"]
    full_s, quick_s = (sum(group.estimate_s for group in make_plan(extent)) for extent in (Extent(), QUICK))
    assert quick_s < 120 < full_s < 580


def test_both_databases_get_the_same_jobs_and_the_store_as_many_waiting_ones_as_it_may_claim() -> None:
    [jobs] = make_plan(Extent(groups=["jobs"], rounds=5, seconds=1.0, warm_s=0.3))
    of = {
        name: [(case.workload, case.load, case.backlog) for case in jobs.cases if case.system.startswith(name)]
        for name in DATABASES
    }
    assert of["sqlite"] == of["postgresql"]
    assert {case.workload for case in jobs.cases} == {"submit", "claim-finish", "claim", "page"}
    assert jobs.databases == list(DATABASES)
    assert jobs.rounds == 3
    [claim, *_] = [case for case in jobs.cases if case.workload == "claim"]
    assert claim.backlog >= (jobs.warm_s + jobs.seconds) / claim.pause_s * claim.agents


def test_without_postgresql_its_cases_are_left_out_and_it_is_told_why() -> None:
    [jobs] = make_plan(Extent(groups=["jobs"], no_postgresql="there is none"))
    assert jobs.databases == ["sqlite"]
    assert {case.system for case in jobs.left_out} == {"postgresql", "postgresql-store"}
    assert len(jobs.left_out) == len(jobs.cases)
    assert jobs.left_out_reason == "there is none"
