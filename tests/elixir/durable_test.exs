defmodule StarweaveImage.DurableTest do
  # Requests that outlive their queue and their BEAM, over a process that works by the protocol.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [await: 1, await_gone: 2, signal: 2]

  alias StarweaveImage.{Error, Image, Journal, TestApplication}

  @moduletag :tmp_dir

  setup %{tmp_dir: folder}, do: {:ok, journal: Path.join(folder, "journal")}

  defp submit(instance, prompt, opts \\ []),
    do: StarweaveImage.submit(prompt, [instance: instance, durable: true] ++ opts)

  defp held(instance, opts \\ []) do
    {:ok, id} = submit(instance, "hold", opts)
    await_running(instance, id)
    id
  end

  # The next life on the same journal.
  defp again(instance, journal, opts \\ []) do
    :ok = stop_supervised(instance)
    instance = start("honest", [journal: journal] ++ opts)
    assert :ok = StarweaveImage.await_ready(20_000, instance: instance)
    instance
  end

  defp received(instance), do: for(["generate", id] <- report(instance)["received"], do: id)

  describe "a durable request" do
    test "goes on in the next life, with its seed, its user and its place", %{journal: journal} do
      instance = start_ready("honest", journal: journal, capacity: 1)
      id = held(instance, seed: 7, num_images: 2, user_id: "ann")
      for n <- 1..3, do: {:ok, _} = submit(instance, "fig #{n}", id: "f#{n}", seed: n)
      {:ok, urgent} = submit(instance, "a pear", priority: :interactive)

      instance = again(instance, journal, capacity: 1)
      assert {:ok, %Image{}} = StarweaveImage.await(urgent, 20_000, instance: instance)
      await_running(instance, id)
      assert StarweaveImage.status(instance: instance).queue.queued == 3

      assert {:error, %Error{details: %{conflict: true}}} =
               submit(instance, "hold", id: id, seed: 8)

      assert {:ok, ^id} = submit(instance, "hold", id: id, seed: 7, num_images: 2, user_id: "ann")

      :ok =
        StarweaveImage.drain_sidecar(1, instance: instance, timeout: 1) |> then(fn _ -> :ok end)

      :ok = StarweaveImage.resume_sidecar(1, instance: instance)

      instance = again(instance, journal, capacity: 2)
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, [one, two]} = StarweaveImage.await_many(id, 20_000, instance: instance)
      assert {one.seed, two.seed} == {7, 8}

      for n <- 1..3 do
        expected = "fig #{n}, seed #{n}"

        assert {:ok, %Image{data: ^expected}} =
                 StarweaveImage.await("f#{n}", 20_000, instance: instance)
      end
    end

    test "that is done is not done again, and its images outlive the process", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      {:ok, id} = submit(instance, "a fig", num_images: 3)

      assert {:ok, [image | _] = images} =
               StarweaveImage.await_many(id, 20_000, instance: instance)

      instance = again(instance, journal)
      await = fn -> StarweaveImage.await_many(id, 20_000, instance: instance) end
      answers = for _ <- 1..3, do: Task.async(await)
      assert Task.await_many(answers, 30_000) == List.duplicate({:ok, images}, 3)
      assert {:ok, ^id} = submit(instance, "a fig", id: id, num_images: 3)
      assert {:error, %Error{details: %{conflict: true}}} = submit(instance, "a pear", id: id)
      assert {:error, :finished} = StarweaveImage.cancel(id, instance: instance)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:image, ^image}}, 10_000
      assert [_report] = received(instance)
    end

    test "whose image was damaged on the disk is drawn again", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      {:ok, id} = submit(instance, "a fig")
      assert {:ok, image} = StarweaveImage.await(id, 20_000, instance: instance)
      instance = again(instance, journal)
      [file] = journal |> Path.join("**/#{image.sha256}") |> Path.wildcard()
      File.write!(file, "another")
      assert {:ok, drawn} = StarweaveImage.await(id, 20_000, instance: instance)
      assert {drawn.data, drawn.seed} == {image.data, image.seed}
      assert id in received(instance)
    end

    test "is the same also in what it does not want", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      id = held(instance, seed: 7, metadata: false, reproducible: true)
      instance = again(instance, journal)
      await_running(instance, id)
      opts = [id: id, seed: 7, metadata: false, reproducible: true]
      assert {:ok, ^id} = submit(instance, "hold", opts)
    end

    test "whose record was lost still has its result", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      {:ok, id} = submit(instance, "a fig")
      {:ok, _} = submit(instance, "a plum")
      assert {:ok, image} = StarweaveImage.await(id, 20_000, instance: instance)
      :ok = stop_supervised(instance)
      log = Path.join(journal, "journal")
      File.write!(log, String.replace(File.read!(log), "a fig", "a pig", global: false))
      instance = start_ready("honest", journal: journal)

      for _ <- 1..2 do
        assert {:ok, kept} = StarweaveImage.await(id, 20_000, instance: instance)
        assert {kept.data, kept.prompt} == {image.data, "a fig"}
      end

      assert {:error, %Error{details: %{conflict: true}}} = submit(instance, "a fig", id: id)
    end

    test "that was refused another try is as it was", %{journal: journal} do
      instance = start_ready("honest", journal: journal, capacity: 1, max_queue: 1)
      late = held(instance, timeout: 200)
      assert {:error, error} = StarweaveImage.await(late, 20_000, instance: instance)
      # One runs and one waits, so that there is no room.
      held(instance)
      {:ok, _} = submit(instance, "hold")
      assert {:error, %Error{kind: :overloaded}} = submit(instance, "hold", id: late)

      instance = again(instance, journal)
      assert {:error, ^error} = StarweaveImage.await(late, 20_000, instance: instance)
    end

    test "that was cancelled or failed stays so", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      running = held(instance)
      assert :ok = StarweaveImage.cancel(running, instance: instance)
      late = held(instance, timeout: 200)

      assert {:error, %Error{kind: :timeout} = error} =
               StarweaveImage.await(late, 20_000, instance: instance)

      instance = again(instance, journal)

      assert {:error, %Error{kind: :cancelled}} =
               StarweaveImage.await(running, 20_000, instance: instance)

      assert {:error, ^error} = StarweaveImage.await(late, 20_000, instance: instance)
      assert [_report] = received(instance)

      # Until it is asked for again.
      assert {:ok, ^late} = submit(instance, "a fig", id: late)
      assert {:ok, %Image{}} = StarweaveImage.await(late, 20_000, instance: instance)
    end

    test "has its timeout also while nothing runs", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      id = held(instance, timeout: 1_500)
      :ok = stop_supervised(instance)
      began = System.monotonic_time(:millisecond)
      assert await(fn -> System.monotonic_time(:millisecond) - began > 1_500 end)
      instance = start("honest", journal: journal)

      assert {:error, %Error{kind: :timeout}} =
               StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "is forgotten with its result", %{journal: journal} do
      instance = start_ready("honest", journal: journal, max_results: 1)
      for id <- ~w(a b), do: {:ok, ^id} = submit(instance, "a fig", id: id)
      for id <- ~w(a b), do: StarweaveImage.await(id, 20_000, instance: instance)
      instance = again(instance, journal)

      assert {:error, %Error{kind: :invalid_request}} =
               StarweaveImage.await("a", 1_000, instance: instance)

      assert {:ok, %Image{}} = StarweaveImage.await("b", 1_000, instance: instance)

      instance = again(instance, journal, result_ttl: 0)

      assert await(fn ->
               match?({:error, _}, StarweaveImage.await("b", 1_000, instance: instance))
             end)
    end

    test "waits while no sidecar can start", %{journal: journal, tmp_dir: folder} do
      instance = start_ready("honest", journal: journal)
      id = held(instance)
      :ok = stop_supervised(instance)

      python = Path.join(folder, "python")
      instance = start(nil, journal: journal, python: python, backoff_max: 100)
      await_state(instance, :down)
      assert {:error, %Error{kind: :unavailable}} = submit(instance, "a fig")
      File.ln_s!(fake("honest"), python)
      await_running(instance, id)
      assert :ok = StarweaveImage.cancel(id, instance: instance)
    end

    test "outlives the queue's own death", %{journal: journal} do
      instance = start_ready("honest", journal: journal)
      id = held(instance, id: "kept")
      test = self()

      caller =
        spawn(fn ->
          send(test, {:called, StarweaveImage.generate("hold", instance: instance, id: "lost")})
        end)

      await_running(instance, "lost")
      assert Process.alive?(caller)

      Process.exit(Process.whereis(instance), :kill)
      assert_receive {:called, {:error, %Error{kind: :unavailable}}}, 10_000
      assert await(fn -> is_pid(Process.whereis(instance)) end)
      await_running(instance, id)
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "is not blamed for a stop in order", %{journal: journal} do
      instance = start_ready("honest", journal: journal, max_attempts: 2)
      id = held(instance)

      instance =
        for _ <- 1..4, reduce: instance do
          instance -> instance |> again(journal, max_attempts: 2) |> tap(&await_running(&1, id))
        end

      # Its last attempt would run alone.
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, %Image{attempts: 1}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "is not blamed for the ends of sidecars that its application outlived", %{
      journal: journal
    } do
      instance = start_ready("honest", journal: journal)
      id = held(instance)

      for attempt <- 1..2 do
        pid = os_pid(instance)
        signal(pid, "KILL")
        assert await(fn -> sidecar(instance).os_pid not in [nil, pid] end)
        await_running(instance, id)
        assert :sys.get_state(instance).attempts.schedule.entries[id].attempts == attempt + 1
      end

      queue = Process.whereis(instance)
      Process.exit(queue, :kill)
      assert await(fn -> Process.whereis(instance) not in [nil, queue] end)
      await_running(instance, id)
      # It ran when the queue ended, once.
      assert :sys.get_state(instance).jobs[id].ends == 1
      assert :ok = StarweaveImage.cancel(id, instance: instance)
    end

    test "that was running at the end of too many lives is given up", %{journal: journal} do
      instance = start_ready("honest", journal: journal, max_attempts: 2)
      ids = for dispatches <- [19, 20], do: {held(instance), dispatches}
      # As if the BEAM had died under it so often.
      for {id, n} <- ids, do: :ok = Journal.attempt(Module.concat(instance, "Journal"), id, n)
      Process.exit(Process.whereis(instance), :kill)

      assert await(fn -> is_pid(Process.whereis(instance)) end)
      [{resumed, _}, {given_up, _}] = ids
      await_running(instance, resumed)

      assert {:error, %Error{kind: :sidecar_crashed}} =
               StarweaveImage.await(given_up, 20_000, instance: instance)

      assert :ok = StarweaveImage.cancel(resumed, instance: instance)
    end
  end

  describe "durability is refused" do
    test "where there is no journal, and to those who wait themselves", %{journal: journal} do
      instance = start_ready("honest")
      assert {:error, %Error{kind: :invalid_request} = error} = submit(instance, "a fig")

      assert {error.message, error.details} ==
               {"durable needs the instance's option journal", %{field: :durable}}

      instance = start_ready("honest", journal: journal)

      assert {:error, %Error{kind: :invalid_request, details: %{field: :durable}}} =
               StarweaveImage.generate("a fig", instance: instance, durable: true)
    end

    test "where the journal cannot be written, and the rest works", %{journal: journal} do
      File.write!(journal, "a file")
      instance = start_ready("honest", journal: journal)

      assert {:error, %Error{kind: :unavailable, retryable?: true} = error} =
               submit(instance, "a fig", id: "a")

      assert error.message =~ "cannot be kept on disk"
      refute error.message =~ journal
      assert {:error, :not_found} = StarweaveImage.cancel("a", instance: instance)
      assert %{queued: 0, bytes: 0} = StarweaveImage.status(instance: instance).queue
      assert {:ok, _} = StarweaveImage.generate("a fig", instance: instance)

      # And once it can be, it is.
      File.rm!(journal)
      assert await(fn -> match?({:ok, _}, submit(instance, "a fig", id: "a")) end)
      assert {:ok, %Image{}} = StarweaveImage.await("a", 20_000, instance: instance)
    end

    test "to a second instance on the same journal, until the first one is gone", %{
      journal: journal
    } do
      first = start_ready("honest", journal: journal)
      id = held(first)
      second = start_ready("honest", journal: journal)
      assert {:error, %Error{kind: :unavailable}} = submit(second, "a fig")
      :ok = stop_supervised(first)
      # It takes over what is there.
      await_running(second, id)
      assert :ok = StarweaveImage.cancel(id, instance: second)
    end
  end

  @tag :slow
  test "what was acknowledged ends, once, however often the BEAM is killed", %{
    tmp_dir: folder,
    journal: journal
  } do
    lives =
      for life <- 1..6 do
        host = TestApplication.start(folder, "durable.exs", [fake("honest"), journal, "#{life}"])
        # At another moment in each: before the first is acknowledged, and when many are done.
        TestApplication.await_line(
          host,
          ~r/\A((?!done ).*\n)*(done .*\n((?!done ).*\n)*){#{(life - 1) * 7}}/
        )

        signal(host.beam, "KILL")
        assert [] = await_gone([host.beam], 5_000)
        lines(host)
      end

    last = TestApplication.start(folder, "durable.exs", [fake("honest"), journal, "wait"])
    TestApplication.await_line(last, ~r/^all done$/m)
    signal(last.beam, "KILL")
    said = Enum.concat(lives) ++ lines(last)

    acknowledged = folder |> Path.join("ids") |> File.read!() |> String.split()
    done = for ["done", id, result] <- said, do: {id, result}
    assert length(acknowledged) > 20
    # Each has ended, and whenever it was asked for, in whichever life, with the same.
    assert done |> Enum.map(&elem(&1, 0)) |> Enum.uniq() |> Enum.sort() == Enum.sort(acknowledged)
    assert length(Enum.uniq(done)) == length(acknowledged)

    # What was done in one life was begun in none of the later ones.
    for {life, index} <- Enum.with_index(lives ++ [lines(last)]),
        ["begun", id] <- life,
        earlier <- Enum.take(lives, index),
        do: refute(Enum.any?(earlier, &match?(["done", ^id, _], &1)))
  end

  # The last line may be cut off.
  defp lines(host),
    do:
      host.output
      |> File.read!()
      |> String.split("\n")
      |> Enum.drop(-1)
      |> Enum.map(&String.split/1)
end
