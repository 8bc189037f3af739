import gzip

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm.data import readers, tables
from recllm.data.rows import scan
from recllm.errors import UserError
from recllm.recipe import DataSection, FilterSection, IdMap, InteractionsSource, ItemsSource, UsersSource

LOG = [
    {"user_id": "7", "item_id": "a", "timestamp": 10, "rating": 4.0},
    {"user_id": "7", "item_id": "b", "timestamp": 11, "rating": 3.5},
    {"user_id": "8", "item_id": "a", "timestamp": 12, "rating": 1.0},
]


def interactions(path, **source):
    return (
        readers.read_interactions(InteractionsSource(path=path if isinstance(path, list) else str(path), **source))
        .drop(readers.ORDER)
        .collect()
    )


def items(path, **source):
    return readers.read_items(ItemsSource(path=str(path), **source))


def users(path, **source):
    return readers.read_users(UsersSource(path=str(path), **source))


IDS = st.text(alphabet="abcXYZ0189_-éß ", min_size=1, max_size=6).map(str.strip).filter(bool)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"user_id": IDS, "item_id": IDS, "timestamp": st.integers(0, 2**33), "rating": st.sampled_from([1.0, 2.5, 5.0])}
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_format_gives_the_same_frame(write, tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    expected = [(r["user_id"], r["item_id"], r["timestamp"], r["rating"]) for r in rows]
    for name in ("log.csv", "log.tsv", "log.parquet", "log.jsonl", "log.inter", "saved"):
        frame = interactions(write(folder / name, rows))
        assert frame.columns == ["user_id", "item_id", "timestamp", "rating"], name
        assert frame.dtypes == [pl.String, pl.String, pl.Int64, pl.Float32], name
        assert frame.rows() == expected, name


def test_whole_numbers_as_ids_are_the_same_in_every_format(write, tmp_path):
    rows = [{"user_id": 7, "item_id": 3, "timestamp": 10.0}]
    for name in ("log.csv", "log.parquet", "log.jsonl", "log.inter", "saved"):
        assert interactions(write(tmp_path / name, rows)).rows() == [("7", "3", 10)], name


def test_columns_map_our_names_to_the_files(write, tmp_path):
    path = write(tmp_path / "log.csv", [{"uid": "7", "when": 5, "iid": "a", "event": "buy"}])
    frame = interactions(path, columns={"user_id": "uid", "item_id": 2, "timestamp": "when", "action": "event"})
    assert frame.rows(named=True) == [{"user_id": "7", "item_id": "a", "timestamp": 5, "action": "buy"}]


def test_no_header_other_separator_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"7\ta\t1\t5\r\n\r\n8\tb\t1\t6\r\n\r\n")
    columns = {"user_id": 0, "item_id": 1, "timestamp": 3}
    assert interactions(path, header=False, separator="\t", columns=columns).rows() == [("7", "a", 5), ("8", "b", 6)]


def test_several_files_are_one_log(write, tmp_path):
    paths = [str(write(tmp_path / f"{name}.csv", [row])) for name, row in zip("xyz", LOG)]
    assert interactions(paths).equals(interactions(write(tmp_path / "all.csv", LOG)))


def test_gzipped_csv_and_its_lines(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n7,a,5\n7,b,x\n"))
    with pytest.raises(UserError, match=r"log.csv.gz, line 3: the timestamp .* is 'x'"):
        interactions(path)


@pytest.mark.parametrize(
    ("value", "unit", "seconds"),
    [
        ("12", "s", 12),
        ("12.9", "s", 12),
        ("-0.5", "s", -1),
        ("8.8e8", "s", 880_000_000),
        ("1659304800025", "ms", 1_659_304_800),
        ("1659304800025123", "us", 1_659_304_800),
        ("1970-01-02", "iso8601", 86_400),
        ("1970-01-01T00:01:00Z", "iso8601", 60),
        ("1970-01-01 00:01", "iso8601", 60),
        ("1970-01-01T00:01:00.75", "iso8601", 60),
        ("1970-01-01T01:01:00+01:00", "iso8601", 60),
        ("1969-12-31T23:31:00.5-0030", "iso8601", 60),
    ],
)
def test_timestamps_become_whole_seconds(write, tmp_path, value, unit, seconds):
    path = write(tmp_path / "log.csv", [{"user_id": "7", "item_id": "a", "timestamp": value}])
    assert interactions(path, timestamp_unit=unit)["timestamp"].to_list() == [seconds]


def test_dates_of_parquet_need_no_unit(tmp_path):
    frame = pl.DataFrame({"user_id": ["7"], "item_id": ["a"], "timestamp": ["1970-01-01 00:01:00"]})
    frame.with_columns(pl.col("timestamp").str.to_datetime()).write_parquet(tmp_path / "log.parquet")
    assert interactions(tmp_path / "log.parquet")["timestamp"].to_list() == [60]


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.inter"])
@pytest.mark.parametrize("value", ["yesterday", "", "1998-01-01", "nan", "inf", "1e30"])
def test_unparsable_timestamp_names_file_line_and_value(write, tmp_path, name, value):
    rows = [{"user_id": "7", "item_id": "a", "timestamp": "5"}, {"user_id": "7", "item_id": "b", "timestamp": value}]
    path = write(tmp_path / name, rows)
    line = 2 if name == "log.jsonl" else 3
    with pytest.raises(
        UserError, match=rf"{name}, line {line}: the timestamp in column \"timestamp\" is .*{value}"
    ) as error:
        interactions(path)
    assert "data.interactions.timestamp_unit" in str(error.value)


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet"])
@pytest.mark.parametrize(
    ("value", "unit", "step"),
    [
        (880_606_923_000, "s", "set data.interactions.timestamp_unit=ms"),
        (880_606_923_000_000, "s", "set data.interactions.timestamp_unit=us"),
        (1_659_304_800_025_123, "s", "set data.interactions.timestamp_unit=us"),
        (-1_659_304_800_025_123, "ms", "set data.interactions.timestamp_unit=us"),
        (1_659_304_800_025_123_456, "s", "divide by 1000 and set data.interactions.timestamp_unit=us"),
        (1_659_304_800_025_123_456, "us", "divide by 1000 and set data.interactions.timestamp_unit=us"),
        (9_007_199_255, "s", "set data.interactions.timestamp_unit=ms"),
        (2**63 - 1, "s", "mend the line"),
        (2**63 + 2**62, "us", "mend the line"),
        (880_606_923, "iso8601", "set data.interactions.timestamp_unit=s"),
    ],
)
def test_time_in_another_unit_names_the_one_that_fits(tmp_path, name, value, unit, step):
    dtype = pl.UInt64 if value > 2**63 else pl.Int64
    frame = pl.DataFrame({"user_id": ["7", "7"], "item_id": ["a", "b"]})
    good = 1 if unit != "iso8601" else value
    frame = frame.with_columns(pl.Series("timestamp", [good, value], dtype=dtype))
    path = tmp_path / name
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[name[4:]](path)
    row = 1 if unit == "iso8601" else 2
    place = {"csv": f"line {row + 1}", "jsonl": f"line {row}", "parquet": f"row {row}"}[name[4:]]
    with pytest.raises(UserError, match=rf"{name}, {place}: the timestamp .* is '{value}'.*no later than 2255: {step}"):
        interactions(path, timestamp_unit=unit)


def test_the_last_time_that_is_read(write, tmp_path):
    for name in ("log.csv", "log.parquet"):
        path = write(tmp_path / name, [{"user_id": "7", "item_id": "a", "timestamp": 9_007_199_254}])
        assert interactions(path)["timestamp"].to_list() == [9_007_199_254]


@pytest.mark.parametrize(
    ("dtype", "value", "seconds"),
    [
        (pl.Datetime("ns"), 60_999_999_999, 60), (pl.Datetime("ms"), -1, -1), (pl.Date, 1, 86_400),
        (pl.Datetime("us", "Europe/Berlin"), 60_000_000, 60),
    ],
)  # fmt: skip
def test_times_of_parquet_types(tmp_path, dtype, value, seconds):
    physical = pl.Int32 if dtype == pl.Date else pl.Int64
    frame = pl.DataFrame({"user_id": ["7"], "item_id": ["a"], "timestamp": pl.Series([value], dtype=physical)})
    frame.with_columns(pl.col("timestamp").cast(dtype)).write_parquet(tmp_path / "log.parquet")
    assert interactions(tmp_path / "log.parquet")["timestamp"].to_list() == [seconds]


@pytest.mark.parametrize("dtype", [pl.Datetime("ms"), pl.Datetime("us"), pl.Datetime("ms", "UTC"), pl.Date])
@pytest.mark.parametrize("value", [10**9, None])
def test_dates_that_lie_too_far_off(tmp_path, dtype, value):
    stored = value if value is None or dtype == pl.Date else value * 10**8
    physical = pl.Series([0, stored], dtype=pl.Int32 if dtype == pl.Date else pl.Int64)
    frame = pl.DataFrame({"user_id": ["7", "7"], "item_id": ["a", "b"], "timestamp": physical})
    frame.with_columns(pl.col("timestamp").cast(dtype)).write_parquet(tmp_path / "log.parquet")
    found = "blank" if value is None else f"stored as {stored}"
    with pytest.raises(UserError, match=rf"row 2: the timestamp .* is {found}, expected a date no later than 2255"):
        interactions(tmp_path / "log.parquet")


def test_types_that_are_no_time(tmp_path):
    for values in ([[1]], [True]):
        pl.DataFrame({"user_id": ["7"], "item_id": ["a"], "timestamp": values}).write_parquet(tmp_path / "log.parquet")
        with pytest.raises(UserError, match=r"holds (List\(Int64\)|Boolean), a timestamp is a date and time"):
            interactions(tmp_path / "log.parquet")


def test_a_date_read_as_a_number_names_the_unit(write, tmp_path):
    path = write(tmp_path / "log.csv", [{"user_id": "7", "item_id": "a", "timestamp": "1998-01-13"}])
    with pytest.raises(UserError, match=r"timestamp_unit=iso8601"):
        interactions(path)


def test_unparsable_date(write, tmp_path):
    path = write(tmp_path / "log.csv", [{"user_id": "7", "item_id": "a", "timestamp": "1998-13-01"}])
    with pytest.raises(UserError, match=r"line 2: .* '1998-13-01', expected an ISO 8601 date"):
        interactions(path, timestamp_unit="iso8601")


def test_the_line_counts_line_breaks_inside_quotes_and_blank_lines(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('note,user_id,item_id,timestamp\n"two\nlines",7,a,5\n\nx,7,b,soon\n')
    with pytest.raises(UserError, match=r"line 5: .*'soon'"):
        interactions(path)


def test_bad_rows_are_counted(write, tmp_path):
    rows = [{"user_id": "7", "item_id": "a", "timestamp": value} for value in ("1", "x", "y", "z")]
    with pytest.raises(UserError, match=r"line 3: .*'x'.*\(3 such rows\)"):
        interactions(write(tmp_path / "log.csv", rows))


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet"])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_blank_ids(write, tmp_path, name, column):
    rows = [dict(row) for row in LOG]
    rows[1][column] = "  " if name == "log.csv" else None
    place = {"log.csv": "line 3", "log.jsonl": "line 2", "log.parquet": "row 2"}[name]
    with pytest.raises(UserError, match=f'{name}, {place}: {column} in column "{column}" is blank'):
        interactions(write(tmp_path / name, rows))


def test_rating_that_is_no_number_and_blank_rating(write, tmp_path):
    path = write(tmp_path / "log.csv", [{**LOG[0], "rating": ""}, {**LOG[1], "rating": "5"}])
    assert interactions(path)["rating"].to_list() == [None, 5.0]
    with pytest.raises(UserError, match=r"line 2: the rating .* is 'good', expected a number"):
        interactions(write(tmp_path / "bad.csv", [{**LOG[0], "rating": "good"}]))


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet", "log.inter", "saved"])
def test_misspelt_column_names_the_nearest(write, tmp_path, name):
    path = write(tmp_path / name, [{"user_id": "7", "itemid": "a", "timestamp": 5}])
    with pytest.raises(
        UserError, match=r'no column "item_id" for item_id, did you mean "itemid"\?; columns there: user_id'
    ):
        interactions(path)


def test_misspelt_name_in_the_mapping(write, tmp_path):
    with pytest.raises(UserError, match=r'unknown name "user", did you mean "user_id"'):
        interactions(write(tmp_path / "log.csv", LOG), columns={"user": "user_id"})
    with pytest.raises(UserError, match=r"user_id is mapped to column 9, but it has 4 columns"):
        interactions(write(tmp_path / "log.csv", LOG), columns={"user_id": 9})
    with pytest.raises(UserError, match=r'no column "session" for session_id'):
        interactions(write(tmp_path / "log.csv", LOG), columns={"session_id": "session"})


def test_columns_that_nobody_needs_are_not_read(write, tmp_path):
    rows = [{**LOG[0], "rating": "PG", "session_id": 1.0}, {**LOG[1], "rating": "R", "session_id": float("nan")}]
    path = write(tmp_path / "log.parquet", rows)
    with pytest.raises(UserError, match=r"is 'PG', expected a number: .*data.interactions.columns.rating=null"):
        interactions(path, columns={"session_id": None})
    with pytest.raises(UserError, match=r"holds Float64, .*data.interactions.columns.session_id=null"):
        interactions(path, columns={"rating": None})
    left = ["user_id", "item_id", "timestamp"]
    assert interactions(path, columns={"rating": None, "session_id": None}).columns == left
    skipped = readers.read_interactions(InteractionsSource(path=str(path)), ["rating", "session_id"])
    assert skipped.collect_schema().names() == [*left, readers.ORDER]
    with pytest.raises(UserError, match=r"item_id is mapped to null, but it is needed"):
        interactions(path, columns={"item_id": None})


def test_ids_that_are_floats(write, tmp_path):
    with pytest.raises(UserError, match=r'column "user_id" holds Float64, an id is text or a whole number'):
        interactions(write(tmp_path / "log.parquet", [{**LOG[0], "user_id": 7.0}]))


@pytest.mark.parametrize("name", ["log.csv", "log.inter", "log.csv.gz", "log.jsonl"])
@pytest.mark.parametrize("column", ["user_id", "action"])
def test_text_that_is_not_utf8_names_file_and_line(write, tmp_path, name, column):
    """The second of two files, also where only a column is wrong that no check looks at."""
    row = {"user_id": "7", "item_id": "a", "timestamp": 5, "action": "x"}
    ending = name.removesuffix(".gz")
    good = write(tmp_path / f"good-{ending}", [row])
    raw = write(tmp_path / ending, [row, {**row, column: "Amélie"}]).read_text(encoding="utf-8").encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    line = 2 if ending == "log.jsonl" else 3
    source = InteractionsSource(path=[str(good), str(tmp_path / name)])
    with pytest.raises(
        UserError, match=rf"/{name}, line {line}: is not UTF-8 text \(byte 0xe9 .*: save the file as UTF-8"
    ):
        readers.collect(readers.read_interactions(source), readers.paths_of(source))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_header_that_is_not_utf8(tmp_path, encoding):
    (tmp_path / "items.csv").write_bytes("item_id,title,année\n1,Heat,1995\n".encode(encoding))
    with pytest.raises(UserError, match=r"items.csv, line 1: is not UTF-8 text"):
        items(tmp_path / "items.csv")


def test_files_that_do_not_fit_together(write, tmp_path):
    one = write(tmp_path / "one.csv", LOG)
    two = write(tmp_path / "two.csv", [{k: v for k, v in LOG[0].items() if k != "rating"}])
    with pytest.raises(UserError, match=r"two.csv: gives the columns .* but .*one.csv gives"):
        interactions([str(one), str(two)])


def test_missing_file_wrong_kind_and_broken_content(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv does not exist: check the path"):
        interactions(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match=r"is a folder, format csv expects a file"):
        interactions(tmp_path, format="csv")
    with pytest.raises(UserError, match=r"is no folder written by datasets.save_to_disk"):
        interactions(tmp_path)
    with pytest.raises(UserError, match=r"names no type, a RecBole file has"):
        interactions(write(tmp_path / "log.csv", LOG), format="recbole")
    with pytest.raises(UserError, match=r"separator '::' has 2 characters, one is expected: replace it in the file by"):
        interactions(write(tmp_path / "log.csv", LOG), separator="::")
    for name in ("empty.csv", "empty.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            interactions(tmp_path / name)
    (tmp_path / "ragged.csv").write_text("user_id,item_id,timestamp\n7,a,5\n7,b,6,extra\n")
    with pytest.raises(UserError, match=r"ragged.csv: cannot be read"):
        interactions(tmp_path / "ragged.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"user_id": "7", "item_id"\n', "line 1: not valid JSON"),
        ('\n{"user_id": "7", "item_id": "a", "timestamp": 5}\n{"user_id"\n', "line 3: not valid JSON"),
        ("[1, 2]\n", r"line 1: holds '\[1, 2\]', one JSON object a line is expected"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"log.jsonl, {message}"):
        interactions(tmp_path / "log.jsonl")


def test_json_of_later_lines_may_be_of_another_type(write, tmp_path):
    rows = [{"user_id": 7, "item_id": "a", "timestamp": 5}] * 2000 + [{"user_id": "x", "item_id": 1, "timestamp": 6.5}]
    assert interactions(write(tmp_path / "log.jsonl", rows)).rows()[-1] == ("x", "1", 6)


def test_hf_folder_with_splits_and_reordered_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_list(LOG)
    DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"holds the splits train: name one, e.g. .*both/train"):
        interactions(tmp_path / "both")
    saved.select([2, 0]).save_to_disk(str(tmp_path / "some"))
    assert interactions(tmp_path / "some")["user_id"].to_list() == ["8", "7"]


def test_items_are_sorted_cleaned_and_keep_attributes(write, tmp_path):
    rows = [
        {"item_id": "10", "movie_title": " Heat\r\n\tagain\x07\u2028! ", "year": 1995, "genre": None},
        {"item_id": "9", "movie_title": "Fargo", "year": 1996, "genre": "crime\ncomedy"},
    ]
    for name in ("items.jsonl", "items.parquet", "saved"):
        frame = items(write(tmp_path / name, rows), columns={"title": "movie_title"})
        assert frame.columns == ["item_id", "title", "year", "genre"], name
        assert [(row[0], row[1], str(row[2]), row[3]) for row in frame.rows()] == [
            ("9", "Fargo", "1996", "crime comedy"), ("10", "Heat again !", "1995", ""),
        ]  # fmt: skip


def test_quotes_are_text_in_recbole_files(write, tmp_path):
    rows = [{"item_id": "1", "title": '"Good" Film'}, {"item_id": "2", "title": '"Open'}]
    assert items(write(tmp_path / "log.item", rows, {"title": "token_seq"}))["title"].to_list() == [
        '"Good" Film',
        '"Open',
    ]


def test_duplicate_items_name_id_and_lines(write, tmp_path):
    path = write(tmp_path / "items.csv", [{"item_id": i, "title": "t"} for i in ("a", "b", " a", "c", "c")])
    with pytest.raises(UserError, match=r'item id "a" stands in line 2, line 4 \(2 ids are duplicate\)'):
        items(path)


@pytest.mark.parametrize("title", ["", " \t", None])
def test_item_without_a_title(write, tmp_path, title):
    rows = [{"item_id": "a", "title": "Heat"}, {"item_id": "b", "title": title}, {"item_id": "c", "title": title}]
    with pytest.raises(UserError, match=r"2 of 3 items have no title \(item ids b, c; the first in line 2\)"):
        items(write(tmp_path / "items.jsonl", rows))


def test_blank_item_id_no_items_and_reserved_names(write, tmp_path):
    with pytest.raises(UserError, match=r"line 2: the item id is blank"):
        items(write(tmp_path / "items.jsonl", [{"item_id": "a", "title": "t"}, {"item_id": None, "title": "t"}]))
    (tmp_path / "none.csv").write_text("item_id,title\n")
    with pytest.raises(UserError, match=r"holds no items"):
        items(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r'column "text" has a name that recllm uses itself'):
        items(write(tmp_path / "items.csv", [{"item_id": "a", "title": "t", "text": "x"}]))
    with pytest.raises(UserError, match=r'no column "titel" for title, did you mean "title"'):
        items(write(tmp_path / "items.csv", [{"item_id": "a", "title": "t"}]), columns={"title": "titel"})


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Int64])
def test_titles_of_any_plain_type_under_another_name(tmp_path, dtype):
    title = pl.Series("name", ["12", "7"]).cast(dtype)
    pl.DataFrame({"item_id": [1, 2]}).with_columns(title).write_parquet(tmp_path / "items.parquet")
    frame = items(tmp_path / "items.parquet", columns={"title": "name"})
    assert (frame["title"].to_list(), frame["title"].dtype) == (["12", "7"], pl.String)
    pl.DataFrame({"item_id": [1, 2]}).with_columns(
        title.extend_constant(None, 0)[:1].append(pl.Series("name", [None], dtype=title.dtype))
    ).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(UserError, match=r"1 of 2 items have no title \(item ids 2"):
        items(tmp_path / "items.parquet", columns={"title": "name"})


def test_title_that_is_a_list(write, tmp_path):
    path = write(tmp_path / "items.parquet", [{"item_id": 1, "names": ["Heat"], "genres": ["crime"]}])
    with pytest.raises(UserError, match=r'column "names" holds List\(String\), title is text'):
        items(path, columns={"title": "names"})
    path = write(tmp_path / "items.parquet", [{"item_id": 1, "title": "Heat", "genres": ["crime"]}])
    assert items(path)["genres"].to_list() == [["crime"]]


def test_attributes_that_are_not_wanted(write, tmp_path):
    path = write(tmp_path / "items.csv", [{"item_id": 1, "title": "Heat", "text": "x", "timestamp": 5}])
    assert items(path, columns={"text": None, "timestamp": None}).columns == ["item_id", "title"]
    with pytest.raises(UserError, match=r"title is mapped to null, but it is needed"):
        items(path, columns={"text": None, "title": None})


def test_users_have_text_attributes(write, tmp_path):
    rows = [{"uid": 10, "age": 24, "job": " film\ncritic "}, {"uid": 9, "age": None, "job": "other"}]
    for name in ("users.jsonl", "users.parquet"):
        frame = users(write(tmp_path / name, rows), columns={"user_id": "uid"})
        assert frame.columns == ["user_id", "age", "job"]
        assert frame.rows() == [("9", "", "other"), ("10", "24", "film critic")], name
    assert users(tmp_path / "users.jsonl", columns={"user_id": "uid", "age": None}).columns == ["user_id", "job"]


def test_users_that_cannot_be_read(write, tmp_path):
    def fails(message, *rows):
        with pytest.raises(UserError, match=message):
            users(write(tmp_path / "users.parquet", list(rows)))

    fails(r'user id "a" stands in row 1, row 3', *({"user_id": u, "age": 1} for u in ("a", "b", " a")))
    fails(r"row 2: the user id is blank", {"user_id": "a"}, {"user_id": ""})
    fails(r'no column "user_id" for user_id, did you mean "userid"', {"userid": "a"})
    fails(r'"tags" holds List\(String\), tags is text', {"user_id": "a", "tags": ["x"]})
    fails(r"rename it, e.g. data.users.columns.my_user_index=user_index", {"user_id": "a", "user_index": 3})
    (tmp_path / "none.csv").write_text("user_id,age\n")
    with pytest.raises(UserError, match=r"holds no users: check the path, data.users.header"):
        users(tmp_path / "none.csv")


@pytest.mark.shared
def test_users_of_movielens(shared_data):
    frame = users(shared_data / "ml-100k" / "ml-100k.user")
    assert frame.height == 943
    assert frame.row(0, named=True) == {
        "user_id": "1", "age": "24", "gender": "M", "occupation": "technician", "zip_code": "85711",
    }  # fmt: skip
    frame = users(shared_data / "ml-1m-dbpedia" / "users.txt", separator="\t", columns={"user_id": "uid"})
    assert frame.rows()[:2] == [("1", "F", "Under 18"), ("2", "M", "56+")]


def id_map(write, tmp_path, pairs, **names):
    path = write(tmp_path / "map.tsv", [{"old": old, "new": new} for old, new in pairs])
    return IdMap(path=str(path), **({"source": "old", "target": "new"} | names), separator="\t")


def test_id_map_translates_and_drops_what_it_does_not_name(write, tmp_path):
    path = write(tmp_path / "items.csv", [{"item_id": i, "title": f"t{i}"} for i in (1, 2, 3)])
    frame = items(path, id_map=id_map(write, tmp_path, [(3, 0), (1, 5), (9, 7)]))
    assert frame.rows() == [("0", "t3"), ("5", "t1")]


def test_id_map_that_does_not_fit(write, tmp_path):
    path = write(tmp_path / "items.csv", [{"item_id": i, "title": f"t{i}"} for i in (1, 2)])
    with pytest.raises(UserError, match=r'no column "olt", did you mean "old"'):
        items(path, id_map=id_map(write, tmp_path, [(1, 5)], source="olt"))
    with pytest.raises(UserError, match=r'column "old" shares no id with the items'):
        items(path, id_map=id_map(write, tmp_path, [(7, 5)]))
    with pytest.raises(UserError, match=r'item id "1" stands in line 2, line 3'):
        items(path, id_map=id_map(write, tmp_path, [(1, 5), (1, 6)]))
    with pytest.raises(UserError, match=r'item id "5" stands in line 2, line 3'):
        items(path, id_map=id_map(write, tmp_path, [(1, 5), (2, 5)]))


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_a_gzip_file_that_is_cut_short_is_named_and_on_demand_skipped(write, tmp_path, name):
    # long enough that the beginning, from which columns are known, is whole
    log = [{"user_id": f"u{n}", "item_id": f"i{n * n * 7919**3 % 10**9}", "timestamp": n} for n in range(20_000)]
    whole = gzip.compress(write(tmp_path / name, log).read_bytes())
    paths = [str(tmp_path / f"{part}-{name}.gz") for part in ("whole", "half")]
    for path, content in zip(paths, (whole, whole[: len(whole) // 2])):
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(tables.Unreadable, match=f"half-{name}.gz: cannot be read to its end .*: copy or download"):
        interactions(paths)
    data = DataSection(interactions=InteractionsSource(path=paths))
    scanned = scan(data, FilterSection(), None, None, skip_unreadable=True)
    assert sum(batch.height for batch in scanned.batches) == 20_000
    assert list(scanned.skipped) == [paths[1]]
