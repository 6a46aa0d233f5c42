defmodule StarweaveImage.JournalRecordsTest do
  # Records with right checksums that this version cannot use: of a wrong shape, or written by a newer version.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance
  import StarweaveImage.TestJournal, only: [images: 1, job: 1, job: 2]

  alias StarweaveImage.{Error, Image, Journal, Msgpack, Result, TestJournal, Text}
  alias StarweaveImage.Journal.{Log, Record}

  @moduletag :tmp_dir
  @moduletag timeout: 120_000

  setup %{tmp_dir: tmp_dir} do
    folder = Path.join(tmp_dir, "journal")
    File.mkdir!(folder)
    {:ok, folder: folder}
  end

  defp msgpack(term), do: term |> Msgpack.encode!() |> IO.iodata_to_binary()

  defp write(folder, payloads) do
    records = for payload <- payloads, {:ok, record} = Log.record(payload), do: record
    File.write!(Path.join(folder, "journal"), records)
  end

  defp open(folder, opts \\ []) do
    {:ok, journal} = Journal.start_link([folder: folder, instance: folder] ++ opts)
    journal
  end

  defp known(journal) do
    %{unfinished: unfinished, finished: finished} = Journal.recover(journal)
    {Enum.map(unfinished, &{&1.id, &1.attempts}), Enum.map(finished, & &1.id)}
  end

  # What a log has, as payloads.
  defp payloads(path) do
    bytes = File.read!(path)
    read = fn offset, count -> {:ok, binary_part(bytes, offset, count)} end

    {:ok, payloads, %{damaged: 0, torn: 0}} =
      Log.fold(read, byte_size(bytes), [], fn payload, _place, acc -> {:ok, [payload | acc]} end)

    Enum.reverse(payloads)
  end

  # What was logged of this folder; other tests log too.
  defp logged(folder, fun) do
    log = capture_log(fun)
    log |> String.split("\n") |> Enum.filter(&String.contains?(&1, folder)) |> Enum.join("\n")
  end

  defp quarantined(folder),
    do: folder |> Path.join("quarantined-*") |> Path.wildcard() |> Enum.sort()

  defp encoded(record) do
    {:ok, payload} = Record.encode(record)
    payload
  end

  defp small(id), do: job(id, %{"image" => nil})
  defp accept(id, job), do: %{"record" => "accept", "id" => id, "job" => job}

  # As it is in the journal: text as keys.
  defp finish(id) do
    for(image <- images(id), do: {%{image | data: ""}, String.duplicate("ab", 32)})
    |> then(&encoded({:finish, id, 1, {:ok, &1}}))
    |> fields()
  end

  defp failed(id), do: fields(encoded({:finish, id, 1, {:error, Error.new(:internal, "no")}}))

  defp fields(payload) do
    {:ok, fields, ""} = Msgpack.decode(payload)
    fields
  end

  # Terms as they may stand in the log, each with what is wrong with it.
  defp wrong do
    image = hd(finish("a")["images"])
    with_image = fn key, value -> %{finish("a") | "images" => [Map.put(image, key, value)]} end

    with_error = fn key, value ->
      %{failed("a") | "error" => %{failed("a")["error"] | key => value}}
    end

    in_request = fn key, value -> accept("a", put_in(small("a"), ["request", key], value)) end

    [
      {<<0xC1, "no MessagePack">>, "it is not MessagePack"},
      {msgpack(1) <> msgpack(2), "it is not one map"},
      {[1, 2], "it is not one map"},
      {1.5, "it is not one map"},
      {%{"id" => "a"}, "it does not say what it records"},
      {%{"record" => 7, "id" => "a"}, "it does not say what it records"},
      {%{"record" => "forget", "id" => "a", "v" => "2"}, "v must be a version"},
      {%{"record" => "forget", "id" => "a", "v" => 0}, "v must be a version"},
      {%{"record" => "forget"}, "id is missing"},
      {%{"record" => "forget", "id" => 7}, "id is no id"},
      {%{"record" => "forget", "id" => String.duplicate("a", 129)}, "id is no id"},
      {%{"record" => "forget", "id" => %{}}, "id is no id"},
      {%{"record" => "accept", "id" => "a"}, "job is missing"},
      {accept("a", []), "job has a wrong type"},
      {accept("a", %{}), "submitted_at is missing"},
      {accept("a", %{small("a") | "submitted_at" => "x"}), "submitted_at has a wrong type"},
      {accept("a", %{small("a") | "submitted_at" => 1.5}), "submitted_at has a wrong type"},
      {accept("a", %{small("a") | "request" => ""}), "request has a wrong type"},
      {accept("a", %{small("a") | "request" => [1]}), "request has a wrong type"},
      {in_request.("prompt", ["x"]), "prompt has a wrong type"},
      {in_request.("seed", nil), "seed is missing"},
      {in_request.("seed", -1), "seed has a wrong type or is out of range"},
      {in_request.("id", "b"), "the request in it has another id"},
      {%{"record" => "attempt", "id" => "a", "n" => "many"}, "n has a wrong type"},
      {%{"record" => "attempt", "id" => "a", "n" => -1}, "n has a wrong type"},
      {%{"record" => "finish", "id" => "a", "images" => [image]}, "at is missing"},
      {%{finish("a") | "at" => :nan}, "at has a wrong type"},
      {%{"record" => "finish", "id" => "a", "at" => 1}, "it has neither images nor an error"},
      {%{finish("a") | "images" => []}, "it has neither images nor an error"},
      {%{finish("a") | "images" => [nil]}, "an image of it: it is not a map"},
      {with_image.("blob", "../../etc/passwd"), "an image of it: blob has a wrong type"},
      {with_image.("format", "gif"), "an image of it: format has a wrong type"},
      {with_image.("width", "wide"), "an image of it: width has a wrong type"},
      {with_image.("notices", [1]), "an image of it: notices has a wrong type"},
      {with_image.("timings", %{"total" => "1"}), "an image of it: timings has a wrong type"},
      {with_image.("parameters", nil), "an image of it: parameters is missing"},
      {with_image.("kind", "mesh"), "an image of it: media_type is missing"},
      {with_image.("kind", "song"), "an image of it: kind has a wrong type"},
      {with_error.("kind", "cheerful"), "kind has a wrong type"},
      {with_error.("message", 7), "message has a wrong type"},
      {with_error.("details", []), "details has a wrong type"},
      {with_error.("details", %{"retry_after_ms" => []}), "retry_after_ms has a wrong type"},
      {with_error.("retryable?", nil), "retryable? is missing"}
    ]
  end

  defp payload(term), do: if(is_binary(term), do: term, else: msgpack(term))

  describe "the cast of a record" do
    test "gives what was written" do
      images = for image <- images("a"), do: {%{image | data: ""}, String.duplicate("ab", 32)}

      error = Error.new(:overloaded, "no", %{field: :width, retry_after_ms: 5, limit: 7})

      blob = String.duplicate("0f", 32)
      facts = %{"score" => 0.5, "words" => ["an", "apple"]}

      made = [
        sha256: blob,
        model: "m",
        seed: 7,
        facts: facts,
        timings: %{total: 9},
        notices: ["n"]
      ]

      text = struct!(Text, [id: "a", text: ""] ++ made)

      others =
        for {kind, index} <- Enum.with_index([:vector, :video, :mesh]),
            do:
              struct!(
                Result,
                [id: "a", index: index, kind: kind, media_type: "x/y", data: ""] ++ made
              )

      for record <- [
            {:attempt, "a", 3},
            {:forget, "a"},
            {:finish, "a", -5, {:ok, images}},
            {:finish, "a", 1, {:ok, for(result <- [text | others], do: {result, blob})}}
          ] do
        assert Record.cast(encoded(record)) == {:ok, record}
        assert %{"v" => 1} = fields(encoded(record))
      end

      # What is no field and no known detail stays text.
      assert {:ok, {:finish, "a", 5, {:error, cast}}} =
               Record.cast(encoded({:finish, "a", 5, {:error, error}}))

      assert {cast.kind, cast.message, cast.retryable?} == {:overloaded, "no", error.retryable?}
      assert cast.details == %{:field => :width, :retry_after_ms => 5, "limit" => 7}

      assert {:ok, {:accept, "a", job}} = Record.cast(encoded({:accept, "a", small("a")}))
      assert job["request"]["prompt"] == small("a")["request"]["prompt"]
    end

    test "names the kind, the id and what is wrong" do
      for {term, reason} <- wrong() do
        assert {:error, rejected} = Record.cast(payload(term)), inspect(term)
        assert rejected.reason =~ reason
      end

      assert {:error, %{record: "forget", id: nil}} =
               Record.cast(msgpack(%{"record" => "forget"}))

      assert {:error, %{record: "attempt", id: "a"}} =
               Record.cast(msgpack(%{"record" => "attempt", "id" => "a"}))
    end

    test "gives something of anything" do
      for n <- 1..2_000 do
        answer = Record.cast(bad("bad-#{n}"))
        assert elem(answer, 0) in [:ok, :newer, :error]
      end
    end

    test "finds whatever may be the name of a file in one of a newer version" do
      [one, other] = for digit <- ~w(a 0), do: String.duplicate(digit, 64)
      more = %{"x" => [1, [one]], other => %{"y" => nil}, "z" => String.duplicate("A", 64)}

      for fields <- [%{"v" => 2, "more" => more}, %{"record" => "rating", "more" => more}] do
        assert {:newer, names} = Record.cast(msgpack(fields))
        assert Enum.sort(names) == [other, one]
      end

      assert Record.cast(msgpack(%{"record" => "forget", "id" => "a", "v" => 1})) ==
               {:ok, {:forget, "a"}}
    end

    test "refuses to write what would not come back" do
      assert Record.encode({:forget, fn -> 1 end}) == {:error, :unencodable}
      assert Record.encode({:forget, [1 | 2]}) == {:error, :unencodable}
      assert {:ok, bytes} = Record.encode({:accept, "a", %{"list" => ["text", [<<0xFF>>]]}})
      assert {:ok, %{"job" => %{"list" => ["text", [<<0xFF>>]]}}, ""} = Msgpack.decode(bytes)
      assert {:ok, bytes} = Record.encode({:forget, <<0xFF>>})
      assert {:ok, %{"id" => <<0xFF>>}, ""} = Msgpack.decode(bytes)
    end
  end

  describe "a record of a wrong shape" do
    test "is set aside and named, with its reason; the next start knows nothing of it", %{
      folder: folder
    } do
      for {term, reason} <- Enum.take_every(wrong(), 7) do
        good = [encoded({:accept, "g", small("g")}), encoded({:attempt, "g", 2})]
        write(folder, [hd(good), payload(term) | tl(good)])

        log =
          logged(folder, fn ->
            journal = open(folder)
            assert Journal.recover(journal).damaged == 1
            assert {[{"g", 2}], _} = known(journal)
            GenServer.stop(journal)
          end)

        [file | _] = Enum.reverse(quarantined(folder))
        assert {reason, payloads(file)} == {reason, [payload(term)]}
        lines = log |> String.split("\n") |> Enum.filter(&(&1 =~ Path.basename(file)))
        assert [line] = lines
        assert line =~ "1 records that cannot be used, kept as quarantined-"
        assert log =~ "at byte #{byte_size(record(hd(good)))}: #{reason}"
        # What a user asked for does not belong into a log.
        refute log =~ "a picture of"

        journal = open(folder)
        assert Journal.recover(journal).damaged == 0
        GenServer.stop(journal)
      end

      assert length(quarantined(folder)) == 4
    end

    defp record(payload) do
      {:ok, record} = Log.record(payload)
      IO.iodata_to_binary(record)
    end

    test "whatever it is, does nothing to those around it", %{folder: folder} do
      for round <- 1..15 do
        File.rm(Path.join(folder, "journal"))
        {steps, expected} = good(round)
        bad = for n <- 1..12, do: bad("bad-#{n}")
        write(folder, mixed(steps, bad))

        capture_log(fn ->
          for _ <- 1..2 do
            journal = open(folder, compact_above: 0)
            {unfinished, finished} = known(journal)
            ours = fn id -> String.starts_with?(id, "good") end
            assert Enum.filter(unfinished, fn {id, _} -> ours.(id) end) == expected.unfinished
            assert Enum.sort(Enum.filter(finished, ours)) == expected.finished
            GenServer.stop(journal)
          end
        end)
      end
    end

    # Some requests that go on and some that have ended, in the order in which that was written.
    defp good(round) do
      ids = for n <- 1..6, do: "good-#{round}-#{n}"
      {open, ended} = Enum.split(ids, 3)

      steps =
        for(id <- ids, do: {:accept, id, small(id)}) ++
          for(id <- open, do: {:attempt, id, round}) ++
          for(id <- ended, do: {:finish, id, 1, {:error, Error.new(:timeout, "no")}})

      {Enum.map(steps, &encoded/1), %{unfinished: Enum.map(open, &{&1, round}), finished: ended}}
    end

    defp mixed([], bad), do: bad
    defp mixed(good, []), do: good

    defp mixed([one | good] = all, [other | bad] = rest) do
      if :rand.uniform(2) == 1, do: [one | mixed(good, rest)], else: [other | mixed(all, bad)]
    end

    # Any term, or a record in which any part is any term.
    defp bad(id) do
      record =
        Enum.random([
          fn -> accept(id, small(id)) end,
          fn -> finish(id) end,
          fn -> failed(id) end,
          fn -> %{"record" => "attempt", "id" => id, "n" => 1} end
        ])

      case :rand.uniform(4) do
        1 -> msgpack(term(3))
        _ -> msgpack(changed(record.(), :rand.uniform(4)))
      end
    end

    defp changed(_term, 0), do: term(2)

    defp changed(map, depth) when is_map(map) and map_size(map) > 0 do
      key = Enum.random(Map.keys(map))

      case :rand.uniform(6) do
        1 -> Map.delete(map, key)
        2 -> Map.put(map, term(0), term(1))
        _ -> Map.update!(map, key, &changed(&1, depth - 1))
      end
    end

    defp changed([item | items], depth), do: [changed(item, depth - 1) | items]
    defp changed(_term, _depth), do: term(2)

    defp term(0) do
      Enum.random([
        nil,
        true,
        0,
        -1,
        0xFFFFFFFFFFFFFFFF,
        -0x8000000000000000,
        1.0e300,
        :nan,
        :infinity,
        "",
        "text",
        {:bin, <<0xFF, 0>>},
        1.5,
        String.duplicate("x", 5_000)
      ])
    end

    defp term(depth) do
      case :rand.uniform(3) do
        1 -> term(0)
        2 -> for _ <- 1..3, do: term(depth - 1)
        3 -> Map.new(1..3, fn _ -> {term(0), term(depth - 1)} end)
      end
    end

    test "in great number is named up to a limit", %{folder: folder} do
      write(folder, List.duplicate(msgpack(%{"record" => "forget"}), 500))
      log = logged(folder, fn -> assert known(open(folder)) == {[], []} end)
      lines = log |> String.split("\n") |> Enum.filter(&(&1 =~ "not used from the journal"))
      assert length(lines) == 20
      assert [file] = quarantined(folder)
      assert length(payloads(file)) == 500
    end

    test "stays where it is while it cannot be copied", %{folder: folder, tmp_dir: tmp_dir} do
      bad = msgpack(%{"record" => "attempt", "id" => "g", "n" => String.duplicate("x", 5_000)})
      write(folder, [bad, encoded({:accept, "g", small("g")})])

      # In a BEAM whose files may have less bytes than that.
      host = TestJournal.start(tmp_dir, :hold, [folder], 1_000)
      TestJournal.await(host, &(["open"] in &1))
      :ok = TestJournal.kill(host)
      assert quarantined(folder) == []
      assert bad in payloads(Path.join(folder, "journal"))
      assert File.read!(host.said <> ".out") =~ "left where they are, no copy is possible"

      capture_log(fn -> assert known(open(folder)) == {[{"g", 0}], []} end)
      assert [file] = quarantined(folder)
      assert payloads(file) == [bad]
      refute bad in payloads(Path.join(folder, "journal"))
    end
  end

  describe "a record of a newer version" do
    test "is kept, with the files that it may name, however often the log is written anew", %{
      folder: folder
    } do
      blob = :sha256 |> :crypto.hash("a picture") |> Base.encode16(case: :lower)
      shelf = Path.join([folder, "blobs", binary_part(blob, 0, 2)])
      File.mkdir_p!(shelf)
      File.write!(Path.join(shelf, blob), "a picture")

      newer = [
        msgpack(%{"v" => 2, "what" => %{"files" => [%{"name" => blob}]}}),
        msgpack(%{"record" => "accept", "id" => "n", "v" => 0xFFFFFFFFFFFFFFFF}),
        msgpack(%{"record" => "rating", "id" => "n", "stars" => 5})
      ]

      write(folder, Enum.intersperse(newer, encoded({:accept, "g", small("g")})))

      log =
        logged(folder, fn ->
          journal = open(folder, compact_above: 0)
          assert known(journal) == {[{"g", 0}], []}
          assert Journal.recover(journal).damaged == 0

          for n <- 1..20 do
            Journal.accept(journal, "x", job("x"))
            Journal.forget(journal, "x")
            assert_receive {:journal, {:forget, "x"}, :ok}, 10_000
            assert n > 0
          end

          Journal.forget(journal, "g")
          assert_receive {:journal, {:forget, "g"}, :ok}, 10_000
          GenServer.stop(journal)
        end)

      assert log =~ "has 3 records of a newer version, which are kept for it"
      assert for(p <- payloads(Path.join(folder, "journal")), p in newer, do: p) == newer
      assert File.read!(Path.join(shelf, blob)) == "a picture"
      assert quarantined(folder) == []
    end
  end

  describe "an instance over such a journal" do
    test "starts, resumes what is good, and tells the end of what cannot be read", %{
      folder: folder
    } do
      now = System.system_time(:millisecond)
      good = fn id -> %{small(id) | "submitted_at" => now} end

      write(folder, [
        msgpack(accept("lost", %{good.("lost") | "submitted_at" => nil})),
        encoded({:accept, "one", good.("one")}),
        msgpack(accept("huge", %{small("huge") | "submitted_at" => 0xFFFFFFFFFFFFFFFF})),
        msgpack(%{"record" => "attempt", "id" => "one", "n" => [1]}),
        encoded({:attempt, "many", 1}),
        msgpack(accept("two", put_in(good.("two"), ["request", "id"], "one"))),
        encoded({:accept, "wide", put_in(good.("wide"), ["request", "width"], %{})}),
        msgpack(finish("one") |> Map.put("images", [%{}])),
        encoded({:finish, "ended", 0x7FFFFFFFFFFFFFFF, {:error, Error.new(:timeout, "late")}}),
        msgpack(%{"v" => 9, "record" => "accept", "id" => "three"}),
        encoded({:accept, "three", good.("three")})
      ])

      {instance, _log} =
        with_log(fn ->
          instance = start_ready("honest", journal: folder)

          for id <- ~w(one three huge),
              do: assert({:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance))

          instance
        end)

      await = fn id -> StarweaveImage.await(id, 20_000, instance: instance) end
      assert {:error, %Error{kind: :internal} = error} = await.("lost")
      assert error.message == "what was asked for cannot be read any more; ask for it again"
      assert {:error, %Error{kind: :internal}} = await.("two")
      assert {:error, %Error{kind: :invalid_request, details: %{field: :width}}} = await.("wide")
      assert {:error, %Error{kind: :timeout}} = await.("ended")
      queue = Process.whereis(instance)

      opts = [instance: instance, durable: true, id: "lost"]
      assert {:ok, "lost"} = StarweaveImage.submit("a fig", opts)
      assert {:ok, %Image{}} = await.("lost")
      assert Process.whereis(instance) == queue

      :ok = stop_supervised(instance)
      instance = start_ready("honest", journal: folder)

      for id <- ~w(one three lost),
          do: assert({:ok, _} = StarweaveImage.await(id, 20_000, instance: instance))
    end
  end
end
