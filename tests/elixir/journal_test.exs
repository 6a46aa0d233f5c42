defmodule StarweaveImage.JournalTest do
  # Real files, and BEAMs that are killed while they write them.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestJournal, only: [images: 1, job: 1, job: 2]
  import StarweaveImage.TestOSProcess, only: [await: 1]

  alias StarweaveImage.{Error, Journal, Msgpack, TestJournal}
  alias StarweaveImage.Journal.{Lock, Log, Record}

  @moduletag :tmp_dir
  @moduletag timeout: 120_000

  setup %{tmp_dir: tmp_dir} do
    {:ok, folder: Path.join(tmp_dir, "a/journal")}
  end

  defp open(folder, opts \\ []) do
    {:ok, journal} = Journal.start_link([folder: folder, instance: folder] ++ opts)
    journal
  end

  # A record, and its answer: what is answered with :ok is durable.
  defp log(journal, record, answer \\ :ok) do
    ask(journal, record)
    id = elem(record, 1)
    operation = elem(record, 0)
    assert_receive {:journal, {^operation, ^id}, ^answer}, 10_000
  end

  defp ask(journal, {:accept, id}), do: Journal.accept(journal, id, job(id))
  defp ask(journal, {:accept, id, more}), do: Journal.accept(journal, id, job(id, more))
  defp ask(journal, {:attempt, id, n}), do: Journal.attempt(journal, id, n)
  defp ask(journal, {:finish, id}), do: Journal.finish(journal, id, {:ok, images(id)})
  defp ask(journal, {:finish, id, result}), do: Journal.finish(journal, id, result)
  defp ask(journal, {:forget, id}), do: Journal.forget(journal, id)

  # As after a kill: nothing is flushed, and nobody says goodbye.
  defp kill(journal) do
    Process.unlink(journal)
    monitor = Process.monitor(journal)
    Process.exit(journal, :kill)
    assert_receive {:DOWN, ^monitor, _, _, _}
  end

  defp known(journal) do
    %{unfinished: unfinished, finished: finished} = Journal.recover(journal)
    {Enum.map(unfinished, &{&1.id, &1.attempts}), Enum.map(finished, & &1.id)}
  end

  defp msgpack(term), do: term |> Msgpack.encode!() |> IO.iodata_to_binary()
  defp log_file(folder), do: Path.join(folder, "journal")

  defp blob_files(folder),
    do:
      Path.wildcard(Path.join(folder, "blobs/**/*"), match_dot: true)
      |> Enum.filter(&File.regular?/1)

  defp aside(folder),
    do: folder |> File.ls!() |> Enum.filter(&String.starts_with?(&1, "damaged-"))

  describe "what is accepted and what is finished" do
    test "comes back equal, from a process that was killed", %{folder: folder} do
      journal = open(folder)
      assert Journal.recover(journal) == %{unfinished: [], finished: [], damaged: 0}

      more = %{
        "prompt" => "a “red” apple",
        "image" => <<0x89, "PNG", 0xC1, "SW", 1, 0xC1, "SW">>,
        "strength" => 0.1,
        "seed" => 0x7FFFFFFFFFFFFFFF,
        "negative_prompt" => nil,
        "metadata" => true,
        "context" => ["one", <<0xFF>>],
        "loras" => %{"a" => %{"scale" => -1.5e-300}}
      }

      error = %Error{
        kind: :overloaded,
        message: "later",
        details: %{field: :steps, retry_after_ms: 5, other: "x"},
        retryable?: false
      }

      log(journal, {:accept, "b", more})
      log(journal, {:accept, "a"})
      log(journal, {:accept, "c"})
      log(journal, {:attempt, "b", 1})
      log(journal, {:attempt, "b", 2})
      before = System.system_time(:millisecond)
      ends = fn journal -> Enum.map(Journal.recover(journal).finished, & &1.finished_at) end
      log(journal, {:finish, "c", {:error, error}})
      # The order of their ends is by the clock.
      await(fn -> System.system_time(:millisecond) > Enum.max(ends.(journal)) end)
      log(journal, {:finish, "a"})

      check = fn journal ->
        assert %{unfinished: [b], finished: [c, a], damaged: 0} = Journal.recover(journal)
        assert b == %{id: "b", job: job("b", more), attempts: 2}
        assert [%{id: "c"}, %{id: "a", finished_at: at}] = [c, a]
        assert at in before..System.system_time(:millisecond)
        assert Journal.result(journal, "a") == {:ok, {:ok, images("a")}}
        # Details are ours to know; of others the names come back as text.
        details = %{:field => :steps, :retry_after_ms => 5, "other" => "x"}
        assert Journal.result(journal, "c") == {:ok, {:error, %{error | details: details}}}
        assert Journal.result(journal, "b") == {:unfinished, b}
        assert Journal.result(journal, "d") == {:error, "it is not in the journal"}
      end

      check.(journal)
      kill(journal)
      journal = open(folder)
      check.(journal)
      check.(journal)
      log(journal, {:forget, "c"})
      log(journal, {:finish, "b"})
      kill(journal)
      assert known(open(folder)) == {[], ["a", "b"]}
    end

    test "are large", %{folder: folder} do
      image = <<0x89, "PNG">> <> :binary.copy(<<0xC1, "SW", 1, 0>>, 2_500_000)
      more = %{"image" => image, "mask" => :binary.copy("m", 12 * 1024 * 1024)}
      journal = open(folder)
      log(journal, {:accept, "a", more})

      log(
        journal,
        {:accept, "b", Map.put(more, "more", :binary.copy("x", 50_000_000))},
        {:error, "it is larger than 64 MiB"}
      )

      log(
        journal,
        {:accept, "c", %{"of" => self()}},
        {:error, "it holds what the journal cannot keep"}
      )

      log(
        journal,
        {:accept, "d", %{"of" => [1 | 2]}},
        {:error, "it holds what the journal cannot keep"}
      )

      kill(journal)
      job = job("a", more)
      assert %{unfinished: [%{id: "a", job: ^job}]} = Journal.recover(open(folder))
    end

    test "is one by its id", %{folder: folder} do
      journal = open(folder)
      log(journal, {:accept, "a", %{"n" => 1}})
      log(journal, {:accept, "a", %{"n" => 2}})
      assert %{unfinished: [%{job: %{"request" => %{"n" => 1}}}]} = Journal.recover(journal)
      log(journal, {:attempt, "a", 1})
      log(journal, {:finish, "a"})
      log(journal, {:attempt, "a", 2})
      log(journal, {:finish, "unknown"})
      log(journal, {:attempt, "unknown", 1})
      log(journal, {:forget, "unknown"})
      log(journal, {:finish, "a", {:error, Error.new(:internal, "the last one counts")}})
      assert {:ok, {:error, _}} = Journal.result(journal, "a")
      assert blob_files(folder) == []
      assert known(journal) == {[], ["a"]}

      # What is finished is begun anew, and then it is another request.
      log(journal, {:accept, "a", %{"n" => 3}})

      check = fn journal ->
        assert %{unfinished: [%{id: "a", job: job, attempts: 0}], finished: []} =
                 Journal.recover(journal)

        assert job == job("a", %{"n" => 3})
      end

      check.(journal)
      kill(journal)
      check.(open(folder))
    end

    test "is written in groups, and all of it when the process is stopped", %{folder: folder} do
      journal = open(folder)
      log(journal, {:accept, "first"})
      :sys.suspend(journal)
      ids = for n <- 1..300, do: "#{n}"
      for id <- ids, do: ask(journal, {:accept, id})
      for id <- ids, do: ask(journal, {:attempt, id, 1})
      refute_received {:journal, _, _}
      :sys.resume(journal)
      GenServer.stop(journal)

      for id <- ids,
          operation <- [:accept, :attempt],
          do: assert_received({:journal, {^operation, ^id}, :ok})

      assert known(open(folder)) == {[{"first", 0} | Enum.map(ids, &{&1, 1})], []}
    end
  end

  describe "image files" do
    test "belong to all results that have them", %{folder: folder} do
      journal = open(folder)
      for id <- ~w(a b), do: log(journal, {:accept, id})
      for id <- ~w(a b), do: log(journal, {:finish, id})
      assert length(blob_files(folder)) == 3
      log(journal, {:forget, "a"})
      assert length(blob_files(folder)) == 2
      assert Journal.result(journal, "b") == {:ok, {:ok, images("b")}}
      log(journal, {:forget, "b"})
      assert blob_files(folder) == []
    end

    test "that nobody refers to are deleted at the start", %{folder: folder} do
      journal = open(folder)
      log(journal, {:accept, "a"})
      log(journal, {:finish, "a"})
      kill(journal)
      kept = Enum.sort(blob_files(folder))
      shelf = Path.dirname(hd(kept))
      File.write!(Path.join(shelf, String.duplicate("0", 64)), "orphan")
      File.write!(hd(kept) <> ".part", "half")
      # A whole log too is nothing before it has its name.
      {:ok, record} = Log.record(msgpack(%{record: "forget", id: "a"}))
      File.write!(Path.join(folder, "journal.new"), [File.read!(log_file(folder)), record])
      journal = open(folder)
      assert Journal.result(journal, "a") == {:ok, {:ok, images("a")}}
      assert Enum.sort(blob_files(folder)) == kept
      refute File.exists?(Path.join(folder, "journal.new"))
    end

    test "that are gone or damaged make their request unfinished again", %{folder: folder} do
      :telemetry.listen()
      journal = open(folder)
      for id <- ~w(a b c), do: log(journal, {:accept, id})
      log(journal, {:attempt, "a", 1})
      for id <- ~w(a b c), do: log(journal, {:finish, id})
      kill(journal)
      [own, other] = for id <- ~w(a b), do: blob(folder, hd(images(id)).data)
      File.rm!(own)
      flip(other, 100)

      log =
        capture_log(fn ->
          assert %{unfinished: [a, b], finished: [%{id: "c"}], damaged: 2} =
                   Journal.recover(open(folder, name: :damaged_images))

          assert [a, b] == [
                   %{id: "a", job: job("a"), attempts: 1},
                   %{id: "b", job: job("b"), attempts: 0}
                 ]
        end)

      assert lines(log, folder) =~ "is damaged: 1 of its images"

      for _ <- 1..2,
          do:
            assert_receive(
              {:telemetry, [:starweave, :image, :journal, :damaged], %{records: 0, images: 1},
               %{instance: ^folder}}
            )

      # Drawn again they are as they were, and the attempts go on.
      log(:damaged_images, {:attempt, "a", 2})
      log(:damaged_images, {:finish, "b"})
      kill(Process.whereis(:damaged_images))
      journal = open(folder)
      assert known(journal) == {[{"a", 2}], ["c", "b"]}
      assert Journal.result(journal, "b") == {:ok, {:ok, images("b")}}

      # And one that is damaged while the journal runs.
      flip(other, 0)
      assert Journal.result(journal, "b") == {:unfinished, %{id: "b", job: job("b"), attempts: 0}}
      assert known(journal) == {[{"a", 2}, {"b", 0}], ["c"]}
    end
  end

  defp blob(folder, data) do
    <<shelf::binary-size(2), _::binary>> =
      name = :sha256 |> :crypto.hash(data) |> Base.encode16(case: :lower)

    Path.join([folder, "blobs", shelf, name])
  end

  defp flip(path, at) do
    bytes = File.read!(path)
    File.write!(path, flip_bit(bytes, 8 * at + 7))
  end

  defp flip_bit(bytes, at) do
    byte = Bitwise.bxor(:binary.at(bytes, div(at, 8)), Bitwise.bsl(1, 7 - rem(at, 8)))

    [before, rest] =
      for {from, to} <- [{0, div(at, 8)}, {div(at, 8) + 1, byte_size(bytes)}],
          do: binary_part(bytes, from, to - from)

    before <> <<byte>> <> rest
  end

  # What was logged of this folder; other tests log too.
  defp lines(log, folder),
    do: log |> String.split("\n") |> Enum.filter(&String.contains?(&1, folder)) |> Enum.join("\n")

  describe "damage to the log" do
    # Short ones, since every byte of them is damaged.
    @small %{"image" => nil}
    @steps [
      {:accept, "a", @small},
      {:accept, "b", @small},
      {:attempt, "a", 1},
      {:finish, "b", {:error, Error.new(:internal, "no")}},
      {:accept, "c", @small},
      {:forget, "a"},
      {:finish, "c", {:error, Error.new(:internal, "no")}},
      {:accept, "d", @small}
    ]

    # What a journal of these steps knows.
    defp known_of(steps) do
      Enum.reduce(steps, {[], []}, fn
        {:accept, id, _}, {open, done} ->
          {open ++ [{id, 0}], done}

        {:attempt, id, n}, {open, done} ->
          {Enum.map(open, &if(elem(&1, 0) == id, do: {id, n}, else: &1)), done}

        {:finish, id, _}, {open, done} ->
          {List.keydelete(open, id, 0), done ++ [id]}

        {:forget, id}, {open, done} ->
          {List.keydelete(open, id, 0), List.delete(done, id)}
      end)
    end

    # The bytes of the log, and the end of each of its records.
    defp write(folder, steps) do
      journal = open(folder)

      ends =
        for step <- steps do
          log(journal, step)
          File.stat!(log_file(folder)).size
        end

      kill(journal)
      {File.read!(log_file(folder)), ends}
    end

    test "a last record that was not written to its end is cut off, wherever that is", %{
      folder: folder
    } do
      {bytes, ends} = write(folder, @steps)
      [whole, before] = ends |> Enum.reverse() |> Enum.take(2)
      assert whole == byte_size(bytes)

      for size <- before..(whole - 1), tail <- ["", <<0::800>>] do
        File.write!(log_file(folder), binary_part(bytes, 0, size) <> tail)

        log =
          capture_log(fn ->
            journal = open(folder)
            assert Journal.recover(journal).damaged == 0
            assert known(journal) == known_of(Enum.drop(@steps, -1))
            assert File.stat!(log_file(folder)).size == before
            log(journal, List.last(@steps))
            kill(journal)
          end)

        assert File.read!(log_file(folder)) == bytes
        refute lines(log, folder) =~ "[error]"

        assert lines(log, folder) =~ "were never written to their end" ==
                 (size > before or tail != "")
      end

      assert aside(folder) == []
    end

    test "a flipped bit costs one record, and is reported", %{folder: folder} do
      :telemetry.listen()
      {bytes, ends} = write(folder, @steps)

      # All of its bytes with the pure reader below; some with all that is around it.
      for at <- Enum.take_random(0..(byte_size(bytes) - 1), 120) do
        File.write!(log_file(folder), bytes)
        flip(log_file(folder), at)
        damaged = File.read!(log_file(folder))
        hit = Enum.find_index(ends, &(at < &1))
        expected = known_of(List.delete_at(@steps, hit))

        log =
          capture_log(fn ->
            journal = open(folder)
            assert Journal.recover(journal).damaged == 1
            assert {at, known(journal)} == {at, expected}
            log(journal, {:accept, "e", @small})
            kill(journal)
          end)

        assert lines(log, folder) =~ "is damaged: 1 of its records"

        assert_received {:telemetry, [:starweave, :image, :journal, :damaged],
                         %{records: 1, images: 0}, %{instance: ^folder}}

        assert folder |> aside() |> Enum.any?(&(File.read!(Path.join(folder, &1)) == damaged))

        journal = open(folder)
        assert Journal.recover(journal).damaged == 0
        {open, done} = expected
        assert known(journal) == {open ++ [{"e", 0}], done}
        kill(journal)
      end

      assert length(aside(folder)) == 4
    end

    test "no content ends the journal", %{folder: folder} do
      {bytes, ends} = write(folder, @steps)
      [first | _] = ends
      {:ok, no_record} = Log.record("not MessagePack")
      {:ok, unknown} = Log.record(msgpack(%{record: "unheard", id: "a"}))

      {:ok, bad_blob} =
        Log.record(
          msgpack(%{
            record: "finish",
            id: "a",
            at: 1,
            images: [%{blob: "../../etc/passwd", format: "png", timings: %{}}]
          })
        )

      absurd = <<0xC1, "SW", 1, 0::32, 0xFFFFFFFF::32, 0::32>>
      absurd = absurd <> <<:erlang.crc32(absurd)::32>>

      for content <- [
            :crypto.strong_rand_bytes(200_000),
            :binary.copy(<<0xC1, "SW", 1>>, 60_000),
            IO.iodata_to_binary([no_record, unknown, bad_blob]),
            absurd,
            "text"
          ] do
        for {content, known} <- [
              {content, {[], []}},
              {[binary_part(bytes, 0, first), content], {[{"a", 0}], []}},
              {[content, binary_part(bytes, 0, first)], {[{"a", 0}], []}},
              {[content, bytes], known_of(@steps)}
            ] do
          File.write!(log_file(folder), content)

          capture_log(fn ->
            journal = open(folder)
            assert known(journal) == known
            kill(journal)
          end)
        end
      end
    end
  end

  describe "the log without a file" do
    defp fold(bytes) do
      read = fn offset, count ->
        assert offset + count <= byte_size(bytes)
        {:ok, binary_part(bytes, offset, count)}
      end

      {:ok, payloads, found} = Log.fold(read, byte_size(bytes), [], &{:ok, [{&1, &2} | &3]})
      for {payload, place} <- payloads, do: assert(Log.payload(read, place) == {:ok, payload})
      {payloads |> Enum.map(&elem(&1, 0)) |> Enum.reverse(), found}
    end

    defp payload do
      parts = [<<0xC1>>, "S", "W", <<0>>, <<1>>, <<0xC1, "SW">>, <<0xC1, "SW", 1>>]

      part = fn ->
        Enum.random([Enum.random(parts), :crypto.strong_rand_bytes(Enum.random(0..9))])
      end

      # Also one that is a record itself, as a user could write it.
      inner = IO.iodata_to_binary(for _ <- 0..Enum.random(0..20), do: part.())
      {:ok, record} = Log.record(inner)
      Enum.random([inner, IO.iodata_to_binary([part.(), record, part.()])])
    end

    defp records(payloads),
      do:
        for(
          payload <- payloads,
          {:ok, record} = Log.record(payload),
          do: IO.iodata_to_binary(record)
        )

    test "any payloads come back, and no place in them is a marker" do
      for _ <- 1..300 do
        payloads = for _ <- 0..Enum.random(0..8), do: payload()
        records = records(payloads)
        assert fold(IO.iodata_to_binary(records)) == {payloads, %{damaged: 0, torn: 0}}
        for record <- records, do: assert([{0, 4}] = :binary.matches(record, <<0xC1, "SW", 1>>))
      end
    end

    test "a flip of any bit, and a cut at any byte, costs what it hits and nothing else" do
      payloads = for _ <- 1..6, do: payload()
      records = records(payloads)
      bytes = IO.iodata_to_binary(records)

      for at <- 0..(bit_size(bytes) - 1) do
        {found, what} = bytes |> flip_bit(at) |> fold()
        hit = hit(records, div(at, 8))
        assert {at, found, what} == {at, List.delete_at(payloads, hit), %{damaged: 1, torn: 0}}
      end

      for size <- 0..(byte_size(bytes) - 1) do
        hit = hit(records, size)
        torn = size - (records |> Enum.take(hit) |> Enum.map(&byte_size/1) |> Enum.sum())

        assert fold(binary_part(bytes, 0, size)) ==
                 {Enum.take(payloads, hit), %{damaged: 0, torn: torn}}
      end
    end

    defp hit([record | records], at) when at >= byte_size(record),
      do: 1 + hit(records, at - byte_size(record))

    defp hit(_records, _at), do: 0

    test "a block that was overwritten, cut out or put in costs the records that it touches" do
      for _ <- 1..500 do
        payloads = for n <- 1..8, do: <<n>> <> payload()
        bytes = IO.iodata_to_binary(records(payloads))
        from = Enum.random(0..(byte_size(bytes) - 1))
        size = Enum.random(1..(byte_size(bytes) - from))
        to = from + size

        new =
          Enum.random([
            :crypto.strong_rand_bytes(size),
            :crypto.strong_rand_bytes(9),
            <<0::size(size)-unit(8)>>,
            ""
          ])

        {found, what} =
          fold(
            binary_part(bytes, 0, from) <> new <> binary_part(bytes, to, byte_size(bytes) - to)
          )

        first = hit(records(payloads), from)
        last = hit(records(payloads), to - 1)
        untouched = Enum.take(payloads, first) ++ Enum.drop(payloads, last + 1)
        # Zeros may have stood there before.
        assert found -- payloads == []
        assert untouched -- found == []
        assert found == Enum.filter(payloads, &(&1 in found))
        # Records that are cut out as a whole leave no trace.
        if what == %{damaged: 0, torn: 0}, do: assert(length(found) == 8 or new == "")
      end
    end

    test "a marker across the pieces that are read of a large one is found" do
      {:ok, record} = Log.record("whole")

      for size <- 65_520..65_545 do
        junk = :binary.copy("j", size)
        assert {["whole"], %{damaged: 1, torn: 0}} = fold(IO.iodata_to_binary([junk, record]))
      end
    end

    test "an absurd length is never read" do
      head = <<0xC1, "SW", 1, 0::32, 0xFFFFFFFF::32, 0::32>>
      assert {[], %{damaged: 1}} = fold(head <> <<:erlang.crc32(head)::32>> <> "some bytes more")
    end

    test "every record is what it was" do
      for record <-
            [
              {:accept, "a", job("a")},
              {:attempt, "a", 3},
              {:forget, "a"},
              {:finish, "a", 1_700_000_000_000,
               {:ok, for(i <- images("a"), do: {%{i | data: ""}, String.duplicate("ab", 32)})}}
            ] ++
              for(kind <- Error.kinds(), do: {:finish, "a", 1, {:error, Error.new(kind, "no")}}) do
        {:ok, payload} = Record.encode(record)
        assert Record.cast(payload) == {:ok, record}
      end
    end
  end

  describe "a folder that cannot be used" do
    test "because something stands in its way is tried again", %{folder: folder} do
      # A file where a folder should be stops root too.
      obstacle = Path.dirname(folder)
      File.write!(obstacle, "")

      log =
        capture_log(fn ->
          journal = open(folder, name: :obstructed)
          assert Journal.recover(journal) == {:error, "not a directory"}
          log(journal, {:accept, "a"}, {:error, "not a directory"})
          log(journal, {:forget, "a"}, {:error, "not a directory"})
          assert Journal.result(journal, "a") == {:error, "not a directory"}
        end)

      assert [_, _] = String.split(lines(log, folder), "cannot be used: not a directory")
      refute_received {:journal, :open, :ok}
      File.rm!(obstacle)
      log(:obstructed, {:accept, "a"})
      assert_received {:journal, :open, :ok}
      assert known(:obstructed) == {[{"a", 0}], []}
    end

    test "is tried again by itself", %{folder: folder} do
      File.mkdir_p!(log_file(folder))
      File.chmod!(folder, 0o700)
      journal = open(folder)
      assert {:error, "illegal operation on a directory"} = Journal.recover(journal)
      File.rmdir!(log_file(folder))
      assert_receive {:journal, :open, :ok}, 10_000
      assert known(journal) == {[], []}
    end

    test "of a journal that does not run", %{folder: folder} do
      journal = open(folder)
      GenServer.stop(journal)
      assert Journal.recover(journal) == {:error, "the journal does not run"}
      assert Journal.result(journal, "a") == {:error, "the journal does not run"}
      assert Journal.accept(journal, "a", %{}) == :ok
    end
  end

  test "a disk without room refuses and loses nothing; with room it goes on", %{
    folder: folder,
    tmp_dir: tmp_dir
  } do
    host = TestJournal.start(tmp_dir, :fill, [folder], 40_000)
    said = TestJournal.await(host, &(["done"] in &1))
    :ok = TestJournal.kill(host)
    before = Enum.count(said, &match?(["accept", "before-" <> _, ":ok"], &1))
    assert before in 5..20
    n = before + 1
    assert (["accept", "before-#{n}"] ++ ["{:error,", "\"file", "too", "large\"}"]) in said
    assert (["accept", "refused"] ++ ["{:error,", "\"file", "too", "large\"}"]) in said
    assert (["finish", "before-1"] ++ ["{:error,", "\"file", "too", "large\"}"]) in said
    # Nothing of it stays.
    assert ["left", "0"] in said
    # A short one had room where a long one had not.
    assert ["attempt", "before-1", ":ok"] in said
    # And what is forgotten is so even where there was no room to say it.
    refute ["forget", "before-3", ":ok"] in said
    assert ["has", "#{before - 1}"] in said
    for id <- ~w(before-1 before-2), do: assert(["finish", id, ":ok"] in said)
    assert ["accept", "after", ":ok"] in said

    log =
      capture_log(fn ->
        journal = open(folder)

        assert %{unfinished: unfinished, finished: finished, damaged: 0} =
                 Journal.recover(journal)

        assert Enum.map(unfinished, & &1.id) == Enum.map(4..before, &"before-#{&1}") ++ ["after"]
        for %{id: id, job: job} <- unfinished, do: assert(job == job(id))
        assert Enum.map(finished, & &1.id) == ~w(before-2 before-1)
        assert {:ok, {:ok, [%{data: data}]}} = Journal.result(journal, "before-2")
        assert data == :binary.copy("x", 200_000)
        assert length(blob_files(folder)) == 1
      end)

    refute lines(log, folder) =~ "never written"
  end

  describe "compaction" do
    test "keeps what is alive and frees the rest", %{folder: folder} do
      journal = open(folder, compact_above: 20_000)
      for id <- ~w(a b c), do: log(journal, {:accept, id})
      log(journal, {:attempt, "b", 3})
      log(journal, {:finish, "c"})

      sizes =
        for n <- 1..60 do
          log(journal, {:accept, "#{n}"})
          log(journal, {:forget, "#{n}"})
          File.stat!(log_file(folder)).size
        end

      assert Enum.max(sizes) < 30_000
      assert length(Enum.filter(Enum.zip(sizes, tl(sizes)), fn {a, b} -> b < a end)) > 5

      check = fn journal ->
        assert known(journal) == {[{"a", 0}, {"b", 3}], ["c"]}
        assert %{unfinished: [%{job: job}, _]} = Journal.recover(journal)
        assert job == job("a")
        assert Journal.result(journal, "c") == {:ok, {:ok, images("c")}}
      end

      check.(journal)
      kill(journal)
      check.(open(folder))
    end

    test "leaves alone a log that is alive", %{folder: folder} do
      journal = open(folder, compact_above: 20_000)
      ids = for n <- 1..30, do: "#{n}"
      for id <- ids, do: log(journal, {:accept, id})
      assert %{size: size} = File.stat!(log_file(folder))
      assert size > 60_000
      assert known(journal) == {Enum.map(ids, &{&1, 0}), []}
    end
  end

  @tag :slow
  test "what was said to be durable is there after SIGKILL at any moment", %{
    folder: folder,
    tmp_dir: tmp_dir
  } do
    for round <- 1..16, reduce: %{} do
      before ->
        host = TestJournal.start(tmp_dir, :append, [folder, "#{round}"])
        lines = Enum.random(5..100)
        TestJournal.await(host, &(length(&1) >= lines))
        # At any moment, or as it writes its log anew.
        size = fn ->
          with {:ok, stat} <- File.stat(log_file(folder)), do: stat.size, else: (_ -> 0)
        end

        [new, before_it] = [Path.join(folder, "journal.new"), size.()]
        anew? = fn -> File.exists?(new) or size.() < before_it end
        :ok = TestJournal.kill(host, fn -> rem(round, 2) == 0 or anew?.() end)
        said = TestJournal.said(host)
        journal = open(folder, compact_above: 20_000)

        assert %{unfinished: unfinished, finished: finished, damaged: 0} =
                 Journal.recover(journal)

        unfinished = Map.new(unfinished, &{&1.id, &1})
        finished = MapSet.new(finished, & &1.id)
        refute Enum.any?(finished, &is_map_key(unfinished, &1))
        for {id, %{job: job}} <- unfinished, do: assert(job == job(id))
        for id <- finished, do: assert(Journal.result(journal, id) == {:ok, {:ok, images(id)}})
        said = for [operation, id] <- said, operation != "beam", do: {operation, id}

        for {"accept", id} <- said, {"forgets", id} not in said do
          assert is_map_key(unfinished, id) or id in finished
        end

        for {"finish", id} <- said, {"forgets", id} not in said, do: assert(id in finished)
        for {"forget", id} <- said, do: refute(is_map_key(unfinished, id) or id in finished)

        for {id, attempts} <- Enum.frequencies(for {"attempt", id} <- said, do: id),
            is_map_key(unfinished, id) do
          assert unfinished[id].attempts in attempts..(attempts + 20)
        end

        # And nothing of the rounds before has changed.
        now =
          Map.merge(
            Map.new(unfinished, fn {id, job} -> {id, job.attempts} end),
            Map.new(finished, &{&1, :finished})
          )

        assert Map.take(now, Map.keys(before)) == before
        assert length(blob_files(folder)) == Enum.count(finished) + min(Enum.count(finished), 1)
        # Few enough that the next rounds compact.
        gone = Enum.drop(Map.keys(now), 20)
        for id <- gone, do: log(journal, {:forget, id})
        GenServer.stop(journal)
        Map.drop(now, gone)
    end
  end

  describe "one user of a folder at a time" do
    test "a second BEAM is refused, and gets in when the first one is killed", %{
      folder: folder,
      tmp_dir: tmp_dir
    } do
      first = TestJournal.start(tmp_dir, :hold, [folder])
      TestJournal.await(first, &(["open"] in &1))
      second = TestJournal.start(tmp_dir, :hold, [folder])
      TestJournal.await(second, &(~w(refused another instance uses its folder) in &1))
      :ok = TestJournal.kill(second)
      # By another path too.
      link = Path.join(tmp_dir, "link")
      File.ln_s!(folder, link)
      waiting = open(link)
      assert {:error, "another instance uses its folder"} = Journal.recover(waiting)
      # It would take the folder before the third does.
      GenServer.stop(waiting)
      :ok = TestJournal.kill(first)
      third = TestJournal.start(tmp_dir, :hold, [folder])
      TestJournal.await(third, &(["open"] in &1))
      :ok = TestJournal.kill(third)
      assert known(open(folder)) == {[], []}
    end

    test "one that waits for it is told when it is free", %{folder: folder} do
      first = open(folder)
      log(first, {:accept, "a"})
      second = open(folder)
      assert {:error, _} = Journal.recover(second)
      log(second, {:accept, "b"}, {:error, "another instance uses its folder"})
      kill(first)
      assert_receive {:journal, :open, :ok}, 10_000
      assert known(second) == {[{"a", 0}], []}
    end

    test "of many who want it at once at most one has it", %{tmp_dir: tmp_dir} do
      # In short and in long paths, which take another way to the socket.
      for folder <- [
            Path.join(tmp_dir, String.duplicate("x", 100)),
            "/tmp/swi-#{System.pid()}-lock"
          ],
          _ <- 1..15 do
        File.mkdir_p!(folder)
        on_exit(fn -> File.rm_rf!(folder) end)
        holders = :counters.new(1, [])
        most = :atomics.new(1, [])

        take = fn ->
          await(fn ->
            with {:ok, _name} <- Lock.take(folder) do
              :counters.add(holders, 1, 1)
              # It holds for a moment, before its end frees it.
              for _ <- 1..200 do
                if :counters.get(holders, 1) > 1, do: :atomics.put(most, 1, 1)
                :erlang.yield()
              end

              :counters.sub(holders, 1, 1)
            end
            |> Kernel.==(:ok)
          end)
        end

        assert List.duplicate(true, 8) ==
                 1..8 |> Enum.map(fn _ -> Task.async(take) end) |> Task.await_many(60_000)

        assert :atomics.get(most, 1) == 0
        assert [] == Path.wildcard(Path.join(folder, "*.new"))
      end
    end
  end
end
