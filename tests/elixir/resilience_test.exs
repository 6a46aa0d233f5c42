defmodule StarweaveImage.ResilienceTest do
  # What happens to requests when sidecars, models and other requests misbehave, over processes that work by the protocol.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [await: 1, signal: 2]

  alias StarweaveImage.{Error, Image}

  defp generate(instance, prompt, opts \\ []),
    do: StarweaveImage.generate(prompt, [instance: instance] ++ opts)

  defp sidecars(instance), do: StarweaveImage.status(instance: instance).sidecars
  defp sidecar(instance, index), do: Enum.find(sidecars(instance), &(&1.index == index))

  defp await_sidecars(instance, states) do
    seen = fn -> Enum.map(sidecars(instance), &{&1.role, &1.state}) end
    assert await(fn -> Enum.sort(seen.()) == Enum.sort(states) end), inspect(seen.())
    instance
  end

  defp running_at(instance, id),
    do: Enum.find_value(sidecars(instance), &(id in &1.running && &1.index))

  defp hold(instance, opts \\ []) do
    {:ok, id} = StarweaveImage.submit("hold", [instance: instance] ++ opts)

    assert await(fn ->
             Enum.any?(sidecars(instance), &Enum.any?(&1.requests, fn r -> r.id == id end))
           end)

    id
  end

  describe "a failure that may pass" do
    for kind <- ~w(model_load_failed out_of_memory unavailable) do
      test "is tried again: #{kind}" do
        instance = start_ready("fails")
        assert {:ok, %Image{attempts: 1}} = generate(instance, "#{unquote(kind)} 2")
      end
    end

    test "is told to those who watch, and given up after so many times" do
      instance = start_ready("fails", max_retries: 1)
      events = Enum.to_list(StarweaveImage.stream("out_of_memory 9", instance: instance))
      assert [{:queued, _}, {:queued, _}, {:error, %Error{kind: :out_of_memory} = error}] = events
      assert error.retryable?
    end

    test "is not tried again where there is no time left, nor where it is of no use" do
      instance = start_ready("fails")
      assert {:error, %Error{kind: kind}} = generate(instance, "unavailable 9", timeout: 200)
      assert kind == :unavailable
      assert {:error, %Error{kind: :internal}} = generate(instance, "internal 1")
      # Not by us: so the sidecar stops.
      assert {:ok, %Image{}} = generate(instance, "cancelled 1")
    end

    test "can be cancelled while it waits for its next try" do
      instance = start_ready("fails", max_retries: 100)
      {:ok, id} = StarweaveImage.submit("unavailable 99", instance: instance)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:queued, %{attempt: 1}}}, 10_000
      assert :ok = StarweaveImage.cancel(id, instance: instance)

      assert {:error, %Error{kind: :cancelled}} =
               StarweaveImage.await(id, 1_000, instance: instance)

      assert %{queued: 0, running: 0, bytes: 0} = StarweaveImage.status(instance: instance).queue
    end
  end

  describe "a model that cannot be loaded" do
    test "is an error unless the request allows another" do
      instance = start_ready("fails")

      assert {:error, %Error{kind: :model_load_failed, retryable?: false}} =
               generate(instance, "a fig", model: "broken/one")
    end

    test "is replaced along the list of its card, and the image says so" do
      instance = start_ready("fails")

      for model <- ["broken/one", "broken"] do
        assert {:ok, image} = generate(instance, "a fig", model: model, fallback: true)
        assert image.model == "starweave/tiny"

        assert [
                 "Model " <> _,
                 "Model broken/two could not be used (its files are damaged): starweave/tiny drew this instead."
               ] = image.notices
      end

      assert {:error, %Error{kind: :model_load_failed}} =
               generate(instance, "a fig", model: "broken/two", fallback: true)
    end

    test "is replaced too where it can, and computes no numbers" do
      instance = start_ready("fails")

      assert {:error, %Error{kind: :internal, details: %{field: :model}, retryable?: false}} =
               generate(instance, "numbers", model: "broken/one")

      assert {:ok, %Image{model: "starweave/tiny"}} =
               generate(instance, "numbers", model: "broken/one", fallback: true)
    end
  end

  describe "a poison request" do
    test "is refused for a while once it is known, under any id and seed" do
      instance = start_ready("crashes_on_poison", quarantine: 60_000)
      assert {:error, %Error{kind: :sidecar_crashed} = first} = generate(instance, "poison")
      assert first.message =~ ~r/ended under this request \d times, \d of them while it ran alone/

      {took, {:error, error}} = :timer.tc(fn -> generate(instance, "poison", seed: 5) end)
      assert %Error{kind: :sidecar_crashed, details: %{retry_after_ms: ms}} = error
      assert ms in 1..60_000
      assert took < 1_000_000
      assert error.message =~ ~r/refused for another \d+ s/
      assert {:ok, _} = generate(instance, "a fig")
    end

    @tag :slow
    test "may come again after that" do
      instance = start_ready("crashes_on_poison", quarantine: 0)
      assert {:error, %Error{kind: :sidecar_crashed}} = generate(instance, "poison")
      assert {:error, %Error{message: message}} = generate(instance, "poison")
      assert message =~ "ended under this request"
    end

    test "among fifty good ones fails alone" do
      instance = start_ready("crashes_on_poison", capacity: 8, backoff_max: 50)
      good = for n <- 1..25, do: Task.async(fn -> generate(instance, "fig #{n}", seed: n) end)
      poison = Task.async(fn -> generate(instance, "poison") end)
      more = for n <- 26..50, do: Task.async(fn -> generate(instance, "fig #{n}", seed: n) end)
      assert {:error, %Error{kind: :sidecar_crashed}} = Task.await(poison, 60_000)

      for {task, n} <- Enum.with_index(good ++ more, 1) do
        expected = "fig #{n}, seed #{n}"
        assert {:ok, %Image{data: ^expected}} = Task.await(task, 60_000)
      end
    end
  end

  describe "a request that is not to blame" do
    @tag :slow
    test "goes on however often its process is killed from outside, and is done in the end" do
      instance = start_ready("takes_its_time", backoff_max: 50)

      # All of one content.
      tasks = for n <- 1..30, do: Task.async(fn -> generate(instance, "a fig", seed: n) end)

      # By a clock of its own, whatever runs: that is what tells a killer from a poison. Starts are spared: on a machine on
      # which they take longer than a turn of the clock, nine killed in a row would be a sidecar that cannot start.
      {:ok, clock} = :timer.send_interval(1_500, :kill)
      for _ <- 1..8, do: assert(await(fn -> strike(instance) end))
      {:ok, :cancel} = :timer.cancel(clock)

      for {task, n} <- Enum.with_index(tasks, 1) do
        expected = "a fig, seed #{n}"
        assert {:ok, %Image{data: ^expected}} = Task.await(task, 120_000)
      end
    end

    defp strike(instance) do
      assert_receive :kill, 10_000

      case sidecar(instance, 1) do
        %{state: state, os_pid: pid} when state in [:ready, :busy] -> signal(pid, "KILL") == :ok
        _starting -> false
      end
    end

    test "waits as long as the starts behind it are killed from outside, up to a number" do
      instance = start_ready("ready_after_seven", backoff_max: 50)
      id = hold(instance)

      kill_start = fn killed ->
        starting? = fn ->
          match?(%{state: :starting, os_pid: p} when p not in [nil, killed], sidecar(instance, 1))
        end

        assert await(starting?)
        pid = sidecar(instance, 1).os_pid
        signal(pid, "KILL")
        pid
      end

      first = sidecar(instance, 1).os_pid
      signal(first, "KILL")
      for _ <- 1..6, reduce: first, do: (killed -> kill_start.(killed))
      assert await(fn -> running_at(instance, id) end)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "says at its deadline how often its process ended" do
      instance = start_ready("honest")
      id = hold(instance, timeout: 5_000)
      signal(sidecar(instance, 1).os_pid, "KILL")

      assert {:error, %Error{kind: :timeout} = error} =
               StarweaveImage.await(id, 20_000, instance: instance)

      assert error.message =~ "its timeout of 5000 ms; the Python process ended under it once"
    end

    @tag :slow
    test "is not failed by what became of another of its content, and may come again" do
      instance = start_ready("crashes_on_poison", backoff_max: 50)
      ask = fn seed -> generate(instance, "unlucky", seed: seed) end
      tasks = for seed <- 11..15, do: {seed, Task.async(fn -> ask.(seed) end)}

      for {seed, task} <- tasks do
        case Task.await(task, 120_000) do
          {:ok, %Image{data: data}} -> assert data == "unlucky, seed #{seed}" and seed != 13
          {:error, error} -> assert {error.kind, seed} == {:sidecar_crashed, 13}
        end
      end

      assert {:ok, %Image{}} = ask.(16)
      assert {:error, %Error{kind: :sidecar_crashed, message: message}} = ask.(13)
      assert message =~ "is refused for another"
    end
  end

  describe "a background request" do
    test "makes room at once for an interactive one, and is done after it" do
      instance = start_ready("honest", capacity: 1)
      id = hold(instance, priority: :background)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      assert {:ok, %Image{}} = generate(instance, "a fig", priority: :interactive)
      assert_receive {:starweave_image, ^id, {:queued, %{position: _, attempt: 1}}}, 10_000
      assert await(fn -> running_at(instance, id) end)
      # A request of normal priority waits for it.
      fig = Task.async(fn -> generate(instance, "a fig", timeout: 300) end)
      assert {:error, %Error{kind: :timeout}} = Task.await(fig)
      assert running_at(instance, id)
    end
  end

  describe "a spare" do
    test "takes over at once, and the one that died is the next spare" do
      instance =
        "honest"
        |> start(standby: 1, backoff_min: 30_000, backoff_max: 60_000)
        |> await_sidecars(active: :ready, standby: :ready)

      assert %{role: :active, os_pid: first} = sidecar(instance, 1)
      id = hold(instance)
      assert running_at(instance, id) == 1

      signal(first, "KILL")
      assert await(fn -> running_at(instance, id) == 2 end)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 20_000, instance: instance)
      assert %{role: :active} = sidecar(instance, 2)
      # A start that was good is followed by the next at once.
      await_sidecars(instance, active: :ready, standby: :ready)
      assert %{role: :standby} = sidecar(instance, 1)

      signal(sidecar(instance, 2).os_pid, "KILL")
      assert await(fn -> sidecar(instance, 1).role == :active end)
      assert {:ok, _} = generate(instance, "a fig")
    end

    test "loads what is to be preloaded when it takes over" do
      instance =
        "honest"
        |> start(standby: 1, preload: ["starweave/tiny"])
        |> await_sidecars(active: :ready, standby: :ready)

      signal(sidecar(instance, 1).os_pid, "KILL")
      assert await(fn -> sidecar(instance, 2).role == :active end)
      assert ["load_model", "preload-starweave:tiny"] in report(instance)["received"]
    end

    test "that is drained does not take over until it may work again" do
      instance =
        "honest"
        |> start(standby: 1, backoff_min: 30_000, backoff_max: 60_000)
        |> await_sidecars(active: :ready, standby: :ready)

      first = sidecar(instance, 1).os_pid
      assert :ok = StarweaveImage.drain_sidecar(2, instance: instance)
      signal(first, "KILL")

      assert await(fn ->
               match?(%{state: :ready, os_pid: pid} when pid != first, sidecar(instance, 1))
             end)

      assert %{role: :active} = sidecar(instance, 1)
      assert {:ok, _} = generate(instance, "a fig")

      # Its next start is far off.
      signal(sidecar(instance, 1).os_pid, "KILL")
      assert await(fn -> sidecar(instance, 1).os_pid == nil end)
      assert %{role: :standby} = sidecar(instance, 2)
      assert :ok = StarweaveImage.resume_sidecar(2, instance: instance)
      assert %{role: :active} = sidecar(instance, 2)
      assert {:ok, _} = generate(instance, "a fig")
    end

    test "is there for each kind of sidecar, and takes no work of its own" do
      instance =
        "honest"
        |> start(standby: 1, sidecars: [[capacity: 2], [capacity: 2], [capacity: 3]])
        |> await_sidecars(
          List.duplicate({:active, :ready}, 3) ++ List.duplicate({:standby, :ready}, 2)
        )

      ids = for _ <- 1..7, do: hold(instance)
      {:ok, waiting} = StarweaveImage.submit("hold", instance: instance)
      assert %{queued: 1, running: 7} = StarweaveImage.status(instance: instance).queue
      assert for(s <- sidecars(instance), s.role == :standby, do: s.running) == [[], []]

      # One of the same kind: with room for three.
      signal(sidecar(instance, 3).os_pid, "KILL")
      assert await(fn -> sidecar(instance, 3).role == :standby end)
      assert %{role: :active, capacity: 3} = Enum.find(sidecars(instance), &(&1.index == 5))
      assert await(fn -> length(sidecar(instance, 5).running) == 3 end)
      for id <- [waiting | ids], do: :ok = StarweaveImage.cancel(id, instance: instance)
    end
  end

  describe "sidecars at run time" do
    test "are added, and given work" do
      instance = start_ready("honest", capacity: 1)
      hold(instance)
      assert {:ok, 2} = StarweaveImage.add_sidecar(instance: instance, capacity: 2)
      assert {:ok, _} = generate(instance, "a fig")
      assert %{capacity: 2, role: :active} = sidecar(instance, 2)

      # Whoever removes it twice must not meet another one by its number.
      assert :ok = StarweaveImage.remove_sidecar(2, instance: instance)
      assert {:ok, 3} = StarweaveImage.add_sidecar(instance: instance)
      assert {:error, :not_found} = StarweaveImage.remove_sidecar(2, instance: instance)
    end

    test "are not added where image generation is disabled" do
      instance = start(nil, enabled: false)

      assert {:error, %Error{kind: :disabled}} = StarweaveImage.add_sidecar(instance: instance)
    end

    test "are drained: no more work for them, and those they have come to their end" do
      instance = start_ready("honest", sidecars: 2)
      await_sidecars(instance, active: :ready, active: :ready)
      id = hold(instance)
      index = running_at(instance, id)

      assert {:error, :timeout} =
               StarweaveImage.drain_sidecar(index, instance: instance, timeout: 50)

      for _ <- 1..8, do: assert(running_at(instance, hold(instance)) != index)
      drained = Task.async(fn -> StarweaveImage.drain_sidecar(index, instance: instance) end)
      assert await(fn -> sidecar(instance, index).draining end)
      assert :ok = StarweaveImage.cancel(id, instance: instance)
      assert :ok = Task.await(drained)

      assert :ok = StarweaveImage.resume_sidecar(index, instance: instance)
      # The other one is full.
      assert running_at(instance, hold(instance)) == index
    end

    test "are removed: what they do not end in time is done by another" do
      instance = start_ready("honest", sidecars: 2)
      await_sidecars(instance, active: :ready, active: :ready)
      id = hold(instance)
      index = running_at(instance, id)
      pid = sidecar(instance, index).os_pid
      assert :ok = StarweaveImage.remove_sidecar(index, instance: instance, timeout: 50)
      refute StarweaveImage.TestOSProcess.alive?(pid)
      assert [_one] = sidecars(instance)
      assert await(fn -> running_at(instance, id) end)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance)
      assert {:error, :not_found} = StarweaveImage.remove_sidecar(index, instance: instance)
      assert {:error, :not_found} = StarweaveImage.drain_sidecar(index, instance: instance)
      assert {:error, :not_found} = StarweaveImage.resume_sidecar(index, instance: instance)
    end

    test "that are ended in the middle of their work have cost no attempt" do
      instance =
        start_ready("works_past_shutdown", sidecars: 2, max_attempts: 1, shutdown_grace: 100)

      await_sidecars(instance, active: :ready, active: :ready)
      id = hold(instance)
      index = running_at(instance, id)
      assert :ok = StarweaveImage.remove_sidecar(index, instance: instance, timeout: 50)
      assert await(fn -> running_at(instance, id) end)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{attempts: 1}} = StarweaveImage.await(id, 20_000, instance: instance)
    end
  end

  describe "an owner whose place another one has taken" do
    # The keeper is killed: the next one starts its owner at once, while the old owner still ends its Python process.
    test "is heard no more, by a queue too busy to hear of either before both have spoken" do
      instance = start_ready("works_past_shutdown", shutdown_grace: 300)
      id = hold(instance)
      [old, queue] = [owner(instance), Process.whereis(instance)]
      {:links, links} = Process.info(old, :links)
      [keeper] = for pid <- links, is_pid(pid), pid != queue, keeper?(pid), do: pid

      :ok = :sys.suspend(queue)
      Process.exit(keeper, :kill)
      assert await(fn -> ready_in_mailbox?(queue) and not Process.alive?(old) end)
      :ok = :sys.resume(queue)

      assert await(fn -> running_at(instance, id) end)
      assert {:ok, %Image{data: "release" <> _}} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    defp keeper?(pid) do
      {:dictionary, dictionary} = Process.info(pid, :dictionary)
      List.keymember?(dictionary, StarweaveImage.Keeper, 0)
    end

    defp ready_in_mailbox?(queue) do
      {:messages, messages} = Process.info(queue, :messages)
      Enum.any?(messages, &(inspect(&1) =~ "{:ready, "))
    end
  end
end
