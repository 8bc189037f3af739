import random

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import schema
from recllm.data import rows as reading
from recllm.data import sequences, spool, synthetic
from recllm.data.randomness import text_keys
from recllm.data.sequences import prepare, source_paths
from recllm.errors import UserError
from recllm.recipe import (
    DataSection,
    FilterSection,
    GivenRows,
    IdMap,
    InteractionsSource,
    ItemsSource,
    SplitSection,
    UsersSource,
)

ANY = SplitSection(method="leave_one_out")
ITEMS = [{"item_id": item, "title": f"Film {item}"} for item in "abcdef"]


def sequences_of(prepared):
    """user id → item ids, oldest first."""
    names = prepared.items["item_id"].to_list()
    return {
        row["user_id"]: "".join(names[item] for item in row["items"])
        for row in prepared.sequences.frame().iter_rows(named=True)
    }


def test_one_sequence_a_user_oldest_first(prepare_rows, log_of):
    rows = log_of("cab", "bacd")
    prepared = prepare_rows(rows[::-1], ITEMS)
    assert sequences_of(prepared) == {"1": "cab", "2": "bacd"}
    assert prepared.sequences.frame().columns == schema.SEQUENCES.names
    first = prepared.sequences.frame().row(0, named=True)
    assert (first["user_index"], first["timestamps"], first["actions"], first["sessions"]) == (0, [1, 2, 3], None, None)
    assert first["user_key"] == text_keys(["1"])[0]
    assert pq.read_schema(prepared.sequences.path) == schema.SEQUENCES
    assert prepared.counts["interactions"] == 7
    assert prepared.counts["users"] == 2


def test_items_without_interactions_stay_in_the_catalogue(prepare_rows, log_of):
    prepared = prepare_rows(log_of("abc"), ITEMS[::-1])
    assert prepared.items["item_id"].to_list() == list("abcdef")
    assert prepared.items["item_index"].to_list() == list(range(6))
    assert prepared.train_counts.tolist() == [1, 0, 0, 0, 0, 0]  # a is train, b valid, c test


def test_ids_are_ordered_as_numbers_where_they_are_numbers(prepare_rows):
    rows = [
        {"user_id": user, "item_id": item, "timestamp": t}
        for user in (10, 9, "x")
        for t, item in enumerate((10, 9, "x"))
    ]
    prepared = prepare_rows(rows)
    assert prepared.sequences.frame()["user_id"].to_list() == ["9", "10", "x"]
    assert prepared.items["item_id"].to_list() == ["9", "10", "x"]


TIED = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.sampled_from("uvw"),
            "item_id": st.sampled_from("abcdef"),
            "timestamp": st.sampled_from([1, 1.25, 2]),
            "session_id": st.sampled_from("st"),
            "action": st.sampled_from(["view", "buy"]),
        }
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TIED, st.randoms(use_true_random=False))
def test_row_order_never_changes_anything(prepare_rows, rows, shuffler):
    whole = [{"user_id": "z", "item_id": item, "timestamp": 5, "session_id": "s", "action": "buy"} for item in "abc"]
    rows = rows + whole
    shuffled = rows.copy()
    shuffler.shuffle(shuffled)
    one, two = prepare_rows(rows, ITEMS), prepare_rows(shuffled, shuffler.sample(ITEMS, len(ITEMS)))
    assert one.sequences.frame().equals(two.sequences.frame())
    assert one.items.equals(two.items)
    assert one.audit == two.audit
    assert np.array_equal(one.train_counts, two.train_counts)


def test_ties_are_drawn_by_lot_for_each_user_and_seed(prepare_rows):
    rows = [{"user_id": str(user), "item_id": item, "timestamp": 1} for user in range(600) for item in "abc"]
    ordered = sequences_of(prepare_rows(rows, ITEMS))
    orders = [list(ordered.values()).count(order) for order in ("abc", "acb", "bac", "bca", "cab", "cba")]
    assert sum(orders) == 600
    assert max(abs(count - 100) for count in orders) < 5 * np.sqrt(100)
    assert sequences_of(prepare_rows(rows, ITEMS, seed=1)) != ordered
    few = [row for row in rows if row["user_id"] in ("3", "77")]  # the lot of a user does not hang on other users
    assert sequences_of(prepare_rows(few, ITEMS)) == {user: ordered[user] for user in ("3", "77")}


def test_fractions_of_a_second_are_no_ties(prepare_rows):
    rows = [{"user_id": str(u), "item_id": i, "timestamp": 100 + n} for u in range(50) for n, i in enumerate("fedcba")]
    prepared = prepare_rows(rows, ITEMS, timestamp_unit="ms")
    assert set(sequences_of(prepared).values()) == {"fedcba"}
    assert prepared.sequences.frame()["timestamps"][0].to_list() == [0] * 6
    assert prepared.audit["users_with_tied_last_timestamps"] == 0


def test_sessions_are_numbered_within_the_user_also_where_they_interleave(prepare_rows):
    order = {"1": "xyxzy", "2": "zzx"}
    rows = [
        {"user_id": user, "item_id": "abcde"[t], "timestamp": t, "session_id": session}
        for user, sessions in order.items()
        for t, session in enumerate(sessions)
    ]
    prepared = prepare_rows(rows, ITEMS)
    assert prepared.sequences.frame()["sessions"].to_list() == [[0, 1, 0, 2, 1], [0, 0, 1]]


def rated(*ratings):
    return [{"user_id": "1", "item_id": item, "timestamp": t, "rating": r} for t, (item, r) in enumerate(ratings)]


def test_min_rating_then_like_at(prepare_rows):
    rows = rated(("a", 1), ("b", 2), ("c", 3.7), ("d", None), ("e", 5))
    prepared = prepare_rows(rows, ITEMS, FilterSection(min_rating=2, like_at=3.7))
    assert sequences_of(prepared) == {"1": "bce"}
    assert prepared.sequences.frame()["actions"].to_list() == [["dislike", "like", "like"]]
    assert (prepared.counts["interactions_read"], prepared.counts["after_min_rating"]) == (5, 3)
    liked = prepare_rows(rows, ITEMS, FilterSection(like_at=2))
    assert liked.sequences.frame()["actions"].to_list() == [["dislike", "like", "like", None, "like"]]


def test_thresholds_are_inclusive_for_fractions(prepare_rows):
    """0.7 is no binary fraction: as float32 it is smaller than as float64."""
    rows = rated(("a", 0.7), ("b", 0.7), ("c", 0.7), ("d", 0.6))
    assert sequences_of(prepare_rows(rows, ITEMS, FilterSection(min_rating=0.7))) == {"1": "abc"}


def test_actions_of_the_source_are_kept_in_order(prepare_rows, log_of):
    rows = [{**row, "action": action} for row, action in zip(log_of("abc"), ("view", None, "buy"))]
    assert prepare_rows(rows[::-1], ITEMS).sequences.frame()["actions"].to_list() == [["view", None, "buy"]]


def test_filters_on_ratings_need_ratings(prepare_rows, log_of):
    for filters in (FilterSection(min_rating=3), FilterSection(like_at=3)):
        with pytest.raises(UserError, match=r"need ratings, the source has no rating column"):
            prepare_rows(log_of("abc"), ITEMS, filters)


def test_unknown_items(prepare_rows, log_of):
    rows = log_of("abxc", "yabcx")
    with pytest.raises(UserError, match=r"3 of 9 interactions have items .* does not hold \(item ids x, y…\)") as error:
        prepare_rows(rows, ITEMS)
    assert "filter.drop_unknown_items" in str(error.value)
    assert sequences_of(prepare_rows(rows, ITEMS, FilterSection(drop_unknown_items=True))) == {"1": "abc", "2": "abc"}


def test_unknown_items_below_the_rating_do_not_matter(prepare_rows):
    rows = [*rated(("a", 5), ("b", 5), ("c", 5), ("x", 1))]
    assert sequences_of(prepare_rows(rows, ITEMS, FilterSection(min_rating=2))) == {"1": "abc"}


def test_k_core_goes_on_until_nothing_changes(prepare_rows, log_of):
    """f has one user and goes. With user_core 4 users 3 and 4 are then short, and without them e has no user left."""
    rows = log_of("abcd", "abcd", "abef", "abe")
    prepared = prepare_rows(rows, ITEMS, FilterSection(user_core=3, item_core=2))
    kept = sequences_of(prepared)
    counts = {item: sum(item in sequence for sequence in kept.values()) for item in "".join(kept.values())}
    assert min(map(len, kept.values())) >= 3
    assert min(counts.values()) >= 2
    assert kept == {"1": "abcd", "2": "abcd", "3": "abe", "4": "abe"}
    assert prepared.items["item_id"].to_list() == list("abcde")  # an item that the core dropped left the catalogue
    tight = prepare_rows(rows, ITEMS, FilterSection(user_core=4, item_core=2))
    assert sequences_of(tight) == {"1": "abcd", "2": "abcd"}
    assert tight.items["item_id"].to_list() == list("abcd")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("abcdef", max_size=8), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_k_core_is_the_largest_that_holds(prepare_rows, log_of, logs, user_core, item_core):
    rows = log_of(*logs, "abcdef", "abcdef", "abcdef", "abcdef")
    prepared = prepare_rows(rows, ITEMS, FilterSection(user_core=user_core, item_core=item_core))
    left = [(row["user_id"], row["item_id"]) for row in rows]
    while True:
        users, items = [pair[0] for pair in left], [pair[1] for pair in left]
        kept = [(u, i) for u, i in left if users.count(u) >= user_core and items.count(i) >= item_core]
        if len(kept) == len(left):
            break
        left = kept
    assert sorted((u, i) for u, items in sequences_of(prepared).items() for i in items) == sorted(left)


def test_nothing_left_gives_the_counts_of_each_step(prepare_rows):
    rows = rated(("a", 5), ("b", 5), ("c", 1))
    with pytest.raises(
        UserError, match=r"interactions_read 3, after_min_rating 2, after_unknown_items 2, after_core 0"
    ):
        prepare_rows(rows, ITEMS, FilterSection(min_rating=2, user_core=3))


def test_inputs_have_a_fingerprint_each(prepare_rows, log_of):
    rows = log_of("abc", "abc")
    one, same, other = (prepare_rows(r, ITEMS).inputs for r in (rows, rows, log_of("abc", "abd")))
    assert one == same
    assert [path.rsplit("/", 1)[1] for path in one] == ["log.jsonl", "items.jsonl"]
    assert [one[path] == other[path] for path in one] == [False, True]


def test_large_shuffled_log_equals_a_plain_sort(prepare_rows):
    generator = random.Random(0)
    rows = [
        {"user_id": generator.randrange(40), "item_id": generator.randrange(30), "timestamp": t} for t in range(3000)
    ]
    prepared = prepare_rows(generator.sample(rows, len(rows)))
    expected: dict[str, list[int]] = {}
    for row in rows:
        expected.setdefault(str(row["user_id"]), []).append(row["item_id"])
    found = {row["user_id"]: row["items"] for row in prepared.sequences.frame().iter_rows(named=True)}
    assert found == expected  # ids 0..29 are their own item_index


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TIED, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["leave_one_out", "temporal"]))
def test_size_of_buckets_and_chunks_changes_nothing(prepare_rows, rows, bucket, chunk, method):
    whole = [
        {"user_id": user, "item_id": item, "timestamp": time, "session_id": item, "action": None}
        for user in "xyz"
        for time, item in enumerate("abcdef")
    ]
    section = SplitSection(method=method, test_fraction=0.3, valid_fraction=0.3, targets="all")

    def outcome():
        try:
            made = prepare_rows(rows + whole, ITEMS, FilterSection(item_core=2), section)
        except UserError as error:  # the times drawn may leave valid empty: then it says so in both cases
            return str(error)
        frame, groups = made.sequences.frame().to_dicts(), pq.ParquetFile(made.sequences.path).num_row_groups
        return frame, made.audit, made.counts, made.split, made.train_counts.tolist(), groups

    one = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "GROUP_POSITIONS", bucket)
        patch.setattr(reading, "_BATCH", chunk)
        patch.setattr(spool, "CHUNK", chunk)
        two = outcome()
    if isinstance(one, str):
        assert two == one
    else:
        assert two[:-1] == one[:-1]
        assert (one[-1], two[-1] > 1) == (1, True)


def test_scratch_files_go_also_after_an_error(prepare_rows, log_of, tmp_path):
    prepare_rows(log_of("abcd"), ITEMS)
    with pytest.raises(UserError, match="came out empty"):
        prepare_rows(log_of("abcd"), ITEMS, split=SplitSection(method="temporal", min_history=9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "log.jsonl", "sequences.parquet"]


USERS = [{"user_id": "2", "job": "other"}, {"user_id": "1", "job": None}, {"user_id": "9", "job": "none"}]


def with_users(write, tmp_path, log, users, filters=None):
    return prepare(
        DataSection(
            interactions=InteractionsSource(path=str(write(tmp_path / "log.csv", log))),
            items=ItemsSource(path=str(write(tmp_path / "items.csv", ITEMS))),
            users=UsersSource(path=str(write(tmp_path / "users.jsonl", users))),
        ),
        filters or FilterSection(),
        SplitSection(method="leave_one_out"),
        0,
        tmp_path,
    )


def test_users_stand_in_the_order_of_the_sequences(write, tmp_path, log_of):
    """Users 1 to 3 in the log, 2 dropped by the core, 3 not in the file, 9 only there."""
    prepared = with_users(write, tmp_path, log_of("abcd", "ab", "abcd"), USERS, FilterSection(user_core=3))
    assert prepared.users.rows() == [(0, "1", ""), (1, "3", "")]
    assert prepared.users.schema == {"user_index": pl.Int32, "user_id": pl.String, "job": pl.String}
    assert prepared.counts["users_without_attributes"] == 1
    assert [path.rsplit("/", 1)[1] for path in prepared.inputs] == ["log.csv", "items.csv", "users.jsonl"]
    everybody = with_users(write, tmp_path, log_of("abcd", "ab", "abcd"), USERS)
    assert everybody.users["job"].to_list() == ["", "other", ""]
    assert everybody.users["user_id"].to_list() == everybody.sequences.frame()["user_id"].to_list()


def test_users_of_another_log(write, tmp_path, log_of):
    with pytest.raises(UserError, match=r"users.jsonl: shares no user id with the interactions"):
        with_users(write, tmp_path, log_of("abcd"), USERS[2:])


def test_no_users_file(prepare_rows, log_of):
    prepared = prepare_rows(log_of("abc"))
    assert prepared.users is None
    assert "users_without_attributes" not in prepared.counts


def test_source_paths_are_what_is_read():
    data = DataSection(
        interactions=InteractionsSource(path=["one", "two", "one"]),
        items=ItemsSource(path="items", id_map=IdMap(path="map", source="a", target="b")),
        users=UsersSource(path="users"),
    )
    given_rows = GivenRows(valid="valid", test="test")
    read = ["one", "two", "items", "map", "users"]
    assert source_paths(data, SplitSection(method="temporal", given=given_rows)) == read
    assert source_paths(data, SplitSection(method="given", given=given_rows)) == [*read, "valid", "test"]


def test_ratings_are_read_only_for_a_filter(prepare_rows):
    rows = [{"user_id": "1", "item_id": i, "timestamp": t, "rating": "PG"} for t, i in enumerate("abc")]
    assert sequences_of(prepare_rows(rows, ITEMS)) == {"1": "abc"}
    with pytest.raises(UserError, match=r"the rating .* is 'PG'"):
        prepare_rows(rows, ITEMS, FilterSection(min_rating=2))


def test_no_more_than_a_bucket_and_a_batch_are_in_memory(tmp_path, monkeypatch):
    """20,000 rows of 300 users pass in pieces: memory does not grow with the log."""
    folder = synthetic.write_interactions(tmp_path / "log", 20_000, 300, 500, seed=0)
    monkeypatch.setattr(sequences, "GROUP_POSITIONS", 1000)
    monkeypatch.setattr(reading, "_BATCH", 500)
    monkeypatch.setattr(spool, "CHUNK", 700)
    sizes = {"batch": [], "chunk": [], "bucket": []}
    batches, chunks, read = sequences.tables.batches, spool.Spool.chunks, spool.Spool.read

    def seen(name, pieces):
        for piece in pieces:
            sizes[name].append(len(piece))
            yield piece

    monkeypatch.setattr(sequences.tables, "batches", lambda *given: seen("batch", batches(*given)))
    monkeypatch.setattr(spool.Spool, "chunks", lambda self: seen("chunk", chunks(self)))
    monkeypatch.setattr(spool.Spool, "read", lambda self, bucket: next(seen("bucket", [read(self, bucket)])))
    data = DataSection(
        interactions=InteractionsSource(path=str(folder / "interactions.parquet")),
        items=ItemsSource(path=str(folder / "items.parquet")),
    )
    prepared = prepare(data, FilterSection(), SplitSection(), 0, tmp_path)
    assert sum(sizes["batch"]) == sum(sizes["bucket"]) == prepared.counts["interactions"] == 20_000
    assert max(sizes["batch"]) <= 500
    assert max(sizes["chunk"]) <= 700
    assert max(sizes["bucket"]) <= 1000 + prepared.sequences.lengths.max()  # one user's overhang
    assert max(batch.column("items").value_lengths().to_numpy().sum() for batch in prepared.sequences.batches(400)) <= (
        400 + prepared.sequences.lengths.max()
    )
