"""Ids, and the store against its protocol."""

from itertools import pairwise

from rest_gateway.jobs.records import JobStore, StoreSettings
from rest_gateway.jobs.store import SqlJobStore, new_job_id


def test_ids_are_version_7_and_ordered_by_time() -> None:
    ids = [new_job_id() for _ in range(1000)]
    assert {(job_id.version, job_id.variant) for job_id in ids} == {(7, "specified in RFC 4122")}
    assert len(set(ids)) == 1000
    milliseconds = [job_id.int >> 80 for job_id in ids]
    assert all(earlier <= later for earlier, later in pairwise(milliseconds))


def test_the_store_is_what_the_protocol_says() -> None:
    store: JobStore = SqlJobStore(StoreSettings())
    assert repr(store)
