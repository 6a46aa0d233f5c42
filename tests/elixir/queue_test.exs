defmodule StarweaveImage.QueueTest do
  # What the queue promises its callers, over a process that works by the protocol.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [alive?: 1, await: 1, signal: 2]

  alias StarweaveImage.{Error, Image}

  # Before each run on trial its sidecar rests, for a time that is drawn from 0 to 10 s; two or three runs are needed.
  @trials_ms 90_000

  # The ids of the messages of this type that the process got, in order.
  defp received(instance, type),
    do: for([^type, id] <- report(instance)["received"], do: id)

  defp generate(instance, prompt, opts \\ []),
    do: StarweaveImage.generate(prompt, [instance: instance] ++ opts)

  # A caller of its own, which tells the test what it got and what else came to it.
  defp call(fun) do
    test = self()

    spawn(fn ->
      result = fun.()
      send(test, {:called, self(), result, mailbox()})
    end)
  end

  defp result(caller, timeout \\ 20_000) do
    assert_receive {:called, ^caller, result, mailbox}, timeout
    assert mailbox == []
    result
  end

  defp await_status(instance, condition) do
    assert await(fn -> condition.(StarweaveImage.status(instance: instance)) end),
           inspect(StarweaveImage.status(instance: instance))
  end

  describe "order" do
    test "is priority and then age, never above the capacity" do
      instance = start_ready("honest", capacity: 1)
      first = submit_running(instance, "hold")

      requests = [
        {"b1", :background},
        {"n1", :normal},
        {"i1", :interactive},
        {"n2", :normal},
        {"b2", :background},
        {"i2", :interactive}
      ]

      for {id, priority} <- requests do
        assert {:ok, ^id} =
                 StarweaveImage.submit("a fig", id: id, priority: priority, instance: instance)
      end

      assert %{queue: %{queued: 6, running: 1, next: next}} =
               StarweaveImage.status(instance: instance)

      assert for(n <- next, do: {n.id, n.position}) == Enum.with_index(~w(i1 i2 n1 n2 b1 b2), 1)
      assert next |> Enum.map(& &1.estimated_start_ms) |> then(&(&1 == Enum.sort(&1)))
      :ok = StarweaveImage.subscribe("n2", instance: instance)
      assert_receive {:starweave_image, "n2", {:queued, %{position: 4, attempt: 1}}}

      assert :ok = StarweaveImage.cancel(first, instance: instance)

      for {id, _} <- requests,
          do: assert({:ok, _} = StarweaveImage.await(id, 20_000, instance: instance))

      assert [^first, "i1", "i2", "n1", "n2", "b1", "b2", _report] =
               received(instance, "generate")
    end

    test "gives each user a turn, however much another one has asked for" do
      instance = start_ready("honest", capacity: 1)
      first = submit_running(instance, "hold", user_id: "dan")

      requests =
        for(n <- 1..4, do: {"a#{n}", "ann"}) ++ [{"b1", "bob"}, {"c1", nil}, {"b2", "bob"}]

      for {id, user} <- requests do
        {:ok, ^id} = StarweaveImage.submit("a fig", id: id, user_id: user, instance: instance)
      end

      assert :ok = StarweaveImage.cancel(first, instance: instance)

      for {id, _} <- requests,
          do: assert({:ok, _} = StarweaveImage.await(id, 20_000, instance: instance))

      assert [^first, "a1", "b1", "c1", "a2", "b2", "a3", "a4", _report] =
               received(instance, "generate")
    end

    test "of a replay is the one it had" do
      instance = start_ready("honest", capacity: 1)
      first = submit_running(instance, "hold")
      {:ok, second} = StarweaveImage.submit("a fig", instance: instance)
      :ok = StarweaveImage.subscribe(first, instance: instance)

      signal(os_pid(instance), "KILL")
      assert_receive {:starweave_image, ^first, {:queued, %{position: 1, attempt: 2}}}, 10_000
      await_running(instance, first)
      assert :ok = StarweaveImage.cancel(first, instance: instance)
      assert {:ok, %Image{attempts: 1}} = StarweaveImage.await(second, 20_000, instance: instance)
    end
  end

  describe "bounds" do
    test "in requests: more are refused, with a time to try again" do
      instance = start_ready("honest", capacity: 1, max_queue: 2)
      running = submit_running(instance, "hold")
      for _ <- 1..2, do: {:ok, _} = StarweaveImage.submit("a fig", instance: instance)

      assert {:error, %Error{kind: :overloaded, retryable?: true} = error} =
               generate(instance, "a pear")

      assert error.details.retry_after_ms >= 100
      assert {:error, %Error{kind: :overloaded}} = StarweaveImage.submit("a", instance: instance)
      assert [{:error, %Error{kind: :overloaded}}] = Enum.to_list(stream(instance, "a pear"))

      assert :ok = StarweaveImage.cancel(running, instance: instance)
      await_status(instance, &(&1.queue.queued == 0))
      assert {:ok, _} = generate(instance, "a pear")
    end

    test "in bytes" do
      instance = start_ready("honest", max_queue_bytes: 2_000)
      image = <<137, "PNG", 13, 10, 26, 10>> <> :binary.copy("x", 1_500)
      id = submit_running(instance, "hold", image: image)
      assert StarweaveImage.status(instance: instance).queue.bytes == byte_size(image) + 4

      assert {:error, %Error{kind: :overloaded}} = generate(instance, "a fig", image: image)
      assert {:ok, _} = generate(instance, "a fig")
      assert :ok = StarweaveImage.cancel(id, instance: instance)
      assert {:ok, _} = generate(instance, "a fig", image: image)
      assert StarweaveImage.status(instance: instance).queue.bytes == 0
    end

    test "in requests within a time, of all and of each user" do
      instance =
        start_ready("honest", rate_limit: {3, 3_600_000}, user_rate_limit: {1, 3_600_000})

      assert {:ok, _} = generate(instance, "a fig", user_id: "ann", id: "a")

      assert {:error, %Error{kind: :rate_limited} = error} =
               generate(instance, "a fig", user_id: "ann")

      assert error.retryable?
      assert_in_delta error.details.retry_after_ms, 3_600_000, 60_000
      assert error.message =~ ~r/try again in 3\d{3}\.\d s/
      assert {:ok, _} = generate(instance, "a fig", user_id: "bob")
      {:ok, id} = StarweaveImage.submit("a fig", instance: instance)
      # To ask for what is known costs nothing.
      assert {:ok, ^id} = StarweaveImage.submit("a fig", id: id, instance: instance)
      assert {:error, %Error{kind: :rate_limited}} = generate(instance, "a fig")
    end

    test "hold for a crowd: each gets its own image or a clear refusal, and nothing is left" do
      instance = start_ready("honest", capacity: 2, max_queue: 10)
      callers = for n <- 1..40, do: {n, call(fn -> generate(instance, "fig #{n}", seed: n) end)}

      for {n, caller} <- callers do
        expected = "fig #{n}, seed #{n}"

        case result(caller) do
          {:ok, image} -> assert %Image{data: ^expected, seed: ^n} = image
          {:error, error} -> assert error.kind == :overloaded
        end
      end

      assert %{queue: %{queued: 0, running: 0, bytes: 0}} =
               StarweaveImage.status(instance: instance)
    end
  end

  describe "a deadline" do
    test "that passes in the queue" do
      instance = start_ready("honest", capacity: 1)
      running = submit_running(instance, "hold")
      caller = call(fn -> generate(instance, "a fig", id: "late", timeout: 100) end)
      assert {:error, %Error{kind: :timeout, retryable?: true}} = result(caller)
      assert StarweaveImage.status(instance: instance).queue.queued == 0

      assert :ok = StarweaveImage.cancel(running, instance: instance)
      refute "late" in received(instance, "generate")
    end

    test "that passes while it runs stops the work" do
      instance = start_ready("honest", capacity: 1)
      caller = call(fn -> generate(instance, "hold", id: "slow", timeout: 300) end)
      assert {:error, %Error{kind: :timeout}} = result(caller)
      assert {:ok, _} = generate(instance, "a fig")
      assert "slow" in received(instance, "cancel")
    end
  end

  describe "a time-out" do
    test "for the queue counts until the request is begun" do
      instance = start_ready("honest", capacity: 1)
      running = submit_running(instance, "hold", queue_timeout: 200)
      caller = call(fn -> generate(instance, "a fig", id: "late", queue_timeout: 100) end)
      assert {:error, %Error{kind: :timeout} = error} = result(caller)
      assert error.message =~ "not begun within its queue_timeout of 100 ms"

      assert {:error, %Error{kind: :timeout}} =
               StarweaveImage.await(running, 300, instance: instance)

      assert :ok = StarweaveImage.cancel(running, instance: instance)
      refute "late" in received(instance, "generate")
    end

    test "for an attempt does not count the wait before it, and frees the device" do
      instance = start_ready("honest", capacity: 1)
      running = submit_running(instance, "hold")
      waiting = call(fn -> generate(instance, "hold", id: "long", run_timeout: 300) end)
      await_status(instance, &(&1.queue.queued == 1))
      caller = call(fn -> StarweaveImage.await(running, 400, instance: instance) end)
      assert {:error, %Error{kind: :timeout}} = result(caller)
      assert :ok = StarweaveImage.cancel(running, instance: instance)
      assert {:error, %Error{kind: :timeout} = error} = result(waiting)
      assert error.message =~ "run_timeout of 300 ms"
      assert {:ok, _} = generate(instance, "a fig")
      assert "long" in received(instance, "cancel")
    end

    test "that comes too late is not that of another request of the same id" do
      instance = start_ready("honest")
      id = submit_running(instance, "hold", id: "again")
      %{serial: serial} = :sys.get_state(instance).jobs[id]
      assert :ok = StarweaveImage.cancel(id, instance: instance)
      "again" = submit_running(instance, "hold", id: "again")

      for kind <- [:deadline, :queue, :run, :retry, :rest],
          do: send(instance, {:timer, kind, id, serial})

      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance)
    end
  end

  describe "a caller that dies" do
    test "takes its request with it, running or waiting" do
      instance = start_ready("honest", capacity: 1)
      running = call(fn -> generate(instance, "hold", id: "running") end)
      await_running(instance, "running")
      waiting = call(fn -> generate(instance, "a fig", id: "waiting") end)
      await_status(instance, &(&1.queue.queued == 1))

      Process.exit(waiting, :kill)
      await_status(instance, &(&1.queue.queued == 0))
      Process.exit(running, :kill)
      await_status(instance, &(&1.queue.running == 0))

      report = report(instance)["received"]
      assert ["cancel", "running"] in report
      refute ["generate", "waiting"] in report
    end

    test "takes its stream with it" do
      instance = start_ready("honest")
      consumer = call(fn -> Enum.to_list(stream(instance, "hold", id: "watched")) end)
      await_running(instance, "watched")
      Process.exit(consumer, :kill)
      await_status(instance, &(&1.queue.running == 0))
      assert "watched" in received(instance, "cancel")
    end

    test "takes with it what it waits for twice" do
      instance = start_ready("honest")

      consumer =
        call(fn ->
          [stream(instance, "hold", id: "twice"), stream(instance, "hold", id: "twice")]
          |> Stream.zip()
          |> Enum.to_list()
        end)

      await_status(instance, fn _ -> length(owners(instance, "twice")) == 2 end)
      await_running(instance, "twice")
      Process.exit(consumer, :kill)
      await_status(instance, &(&1.queue.running == 0))
    end

    test "leaves what it submitted" do
      instance = start_ready("honest")
      test = self()
      spawn(fn -> send(test, StarweaveImage.submit("hold", id: "kept", instance: instance)) end)
      assert_receive {:ok, "kept"}, 10_000
      await_running(instance, "kept")
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await("kept", 20_000, instance: instance)
      assert received(instance, "cancel") == []
    end

    test "leaves a request that another one waits for too" do
      instance = start_ready("honest")
      [first, second] = for _ <- 1..2, do: call(fn -> generate(instance, "hold", id: "both") end)
      await_running(instance, "both")
      # A call after theirs is answered after theirs were taken in.
      await_status(instance, fn _ -> length(owners(instance, "both")) == 2 end)

      Process.exit(first, :kill)
      await_status(instance, fn _ -> length(owners(instance, "both")) == 1 end)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = result(second)
      assert received(instance, "generate") |> Enum.count(&(&1 == "both")) == 1
    end
  end

  defp owners(instance, id),
    do: get_in(:sys.get_state(instance).jobs, [id, Access.key(:owners, [])]) || []

  describe "an id" do
    test "that is known is the same request" do
      instance = start_ready("honest")

      for _ <- 1..3,
          do: {:ok, "one"} = StarweaveImage.submit("a fig", id: "one", instance: instance)

      assert {:ok, image} = StarweaveImage.await("one", 20_000, instance: instance)
      assert {:ok, ^image} = generate(instance, "a fig", id: "one")
      assert {:ok, ^image} = StarweaveImage.await("one", 20_000, instance: instance)
      assert [{:image, ^image}] = Enum.to_list(stream(instance, "a fig", id: "one"))
      assert {:error, :finished} = StarweaveImage.cancel("one", instance: instance)
      assert ["one", _report] = received(instance, "generate")
    end

    test "that is known is refused for anything else, and for another user" do
      instance = start_ready("honest")
      {:ok, "one"} = StarweaveImage.submit("a fig", id: "one", user_id: "ann", instance: instance)
      assert {:ok, image} = StarweaveImage.await("one", 20_000, instance: instance)
      held = submit_running(instance, "hold", id: "held", seed: 1)

      for {prompt, opts} <- [
            {"a pear", [id: "one", user_id: "ann"]},
            {"a fig", [id: "one", user_id: "ann", steps: 2]},
            {"a fig", [id: "one", user_id: "bob"]},
            {"hold", [id: held, seed: 2]},
            {"hold", [id: held]}
          ] do
        for ask <- [&StarweaveImage.submit/2, &StarweaveImage.generate/2] do
          assert {:error, %Error{kind: :invalid_request} = error} =
                   ask.(prompt, [instance: instance] ++ opts)

          assert error.details == %{field: :id, conflict: true}
        end
      end

      # It may say which seed was drawn, and how urgent it is now.
      again = [id: "one", user_id: "ann", seed: image.seed, priority: :interactive]
      assert {:ok, ^image} = generate(instance, "a fig", again)
      assert :ok = StarweaveImage.cancel(held, instance: instance)
    end

    test "that was generated and then submitted outlives its first caller" do
      instance = start_ready("honest")
      caller = call(fn -> generate(instance, "hold", id: "both") end)
      await_running(instance, "both")
      {:ok, "both"} = StarweaveImage.submit("hold", id: "both", instance: instance)
      Process.exit(caller, :kill)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await("both", 20_000, instance: instance)
    end

    test "may be used again at once after it was cancelled" do
      instance = start_ready("slow_to_cancel")
      assert [{:queued, _} | _] = stream(instance, "hold", id: "again") |> Enum.take(2)

      assert {:ok, %Image{data: "a fig, seed 6"}} =
               generate(instance, "a fig", id: "again", seed: 6)
    end

    test "of one that failed may be asked for again" do
      instance = start_ready("honest")
      id = submit_running(instance, "hold", id: "again")
      assert :ok = StarweaveImage.cancel(id, instance: instance)

      assert {:error, %Error{kind: :cancelled}} =
               StarweaveImage.await(id, 1_000, instance: instance)

      assert {:ok, ^id} = StarweaveImage.submit("a fig", id: id, seed: 6, instance: instance)

      assert {:ok, %Image{data: "a fig, seed 6"}} =
               StarweaveImage.await(id, 20_000, instance: instance)

      assert {:ok, %Image{data: "a fig, seed 6"}} = generate(instance, "a fig", id: id, seed: 6)
    end

    test "of nobody" do
      instance = start_ready("honest")

      assert {:error, %Error{kind: :invalid_request, details: %{field: :id}}} =
               StarweaveImage.await("nobody", 1_000, instance: instance)

      assert {:error, :not_found} = StarweaveImage.cancel("nobody", instance: instance)
      assert {:error, :not_found} = StarweaveImage.subscribe("nobody", instance: instance)
      assert :ok = StarweaveImage.unsubscribe("nobody", instance: instance)
    end
  end

  defp stream(instance, prompt, opts \\ []),
    do: StarweaveImage.stream(prompt, [instance: instance] ++ opts)

  describe "events" do
    test "of a stream come in order and end with the images" do
      instance = start_ready("honest")

      caller = call(fn -> Enum.to_list(stream(instance, "a fig", seed: 1, num_images: 2)) end)

      assert [
               {:queued, %{position: 1, attempt: 1}},
               {:progress, %{phase: :denoising, step: 1, steps: 4, num_images: 2, image: 0}},
               {:progress, %{step: 4, elapsed_ms: 4, attempt: 1}},
               {:image, %Image{index: 0, seed: 1, data: "a fig, seed 1"}},
               {:image, %Image{index: 1, seed: 2, data: "a fig, seed 2"}}
             ] = result(caller)
    end

    test "of a stream that is left early stop, and so does the work" do
      instance = start_ready("honest")
      caller = call(fn -> Enum.take(stream(instance, "hold", id: "left"), 2) end)
      assert [{:queued, _}, {:progress, _}] = result(caller)
      await_status(instance, &(&1.queue.running == 0))
      assert "left" in received(instance, "cancel")
    end

    test "of a stream of what was submitted leave that alone when it is left" do
      instance = start_ready("honest")
      id = submit_running(instance, "hold")
      # It runs already: the first event says how far it is.
      caller = call(fn -> Enum.take(stream(instance, "hold", id: id), 2) end)
      await_status(instance, fn _ -> length(owners(instance, id)) == 1 end)
      signal(os_pid(instance), "KILL")
      assert [{:progress, %{step: 1}}, {:queued, %{attempt: 2}}] = result(caller)
      await_running(instance, id)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "tell whoever comes late how things stand" do
      instance = start_ready("previews", capacity: 1)
      id = submit_running(instance, "hold", preview: true, num_images: 2)

      await_status(instance, fn _ -> map_size(:sys.get_state(instance).jobs[id].previews) == 2 end)

      :ok = StarweaveImage.subscribe(id, instance: instance)

      for image <- 0..1,
          do: assert_received({:starweave_image, ^id, {:preview, %{image: ^image, step: 1}}})

      for image <- 0..1,
          do: assert_received({:starweave_image, ^id, {:progress, %{image: ^image, step: 1}}})

      assert mailbox() == []

      {:ok, waiting} = StarweaveImage.submit("a fig", instance: instance)
      :ok = StarweaveImage.subscribe(waiting, instance: instance)

      assert_received {:starweave_image, ^waiting,
                       {:queued, %{position: 1, estimated_start_ms: ms}}}

      assert ms >= 0
      assert :ok = StarweaveImage.cancel(id, instance: instance)
      assert {:ok, _} = StarweaveImage.await(waiting, 20_000, instance: instance)
    end

    test "show those who wait that they come closer" do
      instance = start_ready("honest", capacity: 1)
      running = submit_running(instance, "hold")

      [_, _, third] =
        ids = for _ <- 1..3, do: StarweaveImage.submit("hold", instance: instance) |> elem(1)

      :ok = StarweaveImage.subscribe(third, instance: instance)
      assert_received {:starweave_image, ^third, {:queued, %{position: 3}}}
      assert :ok = StarweaveImage.cancel(running, instance: instance)
      assert_receive {:starweave_image, ^third, {:queued, %{position: 2}}}, 10_000
      assert :ok = ids |> hd() |> StarweaveImage.cancel(instance: instance)
      assert_receive {:starweave_image, ^third, {:queued, %{position: 1}}}, 10_000
      for id <- tl(ids), do: assert(:ok = StarweaveImage.cancel(id, instance: instance))
    end

    test "of a refused stream are one error" do
      instance = start_ready("honest")
      caller = call(fn -> Enum.to_list(stream(instance, "a fig", steps: 0)) end)
      assert [{:error, %Error{kind: :invalid_request}}] = result(caller)
    end

    test "reach subscribers, and none after they unsubscribed" do
      instance = start_ready("honest", capacity: 1)
      first = submit_running(instance, "hold")
      {:ok, id} = StarweaveImage.submit("hold", instance: instance)
      assert :ok = StarweaveImage.subscribe(id, instance: instance)
      assert :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:queued, %{position: 1}}}
      assert_receive {:starweave_image, ^id, {:queued, %{position: 1}}}

      :ok = StarweaveImage.cancel(first, instance: instance)
      # Subscribed twice, told once.
      assert_receive {:starweave_image, ^id, {:progress, %{step: 1}}}, 10_000
      refute_received {:starweave_image, ^id, _}

      assert :ok = StarweaveImage.unsubscribe(id, instance: instance)
      assert :ok = StarweaveImage.cancel(id, instance: instance)

      assert {:error, %Error{kind: :cancelled}} =
               StarweaveImage.await(id, 1_000, instance: instance)

      assert mailbox() == []
    end

    test "of a finished request are its last" do
      instance = start_ready("honest")
      {:ok, id} = StarweaveImage.submit("a fig", instance: instance)
      {:ok, image} = StarweaveImage.await(id, 20_000, instance: instance)
      assert :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:image, ^image}}
      assert mailbox() == []
    end
  end

  describe "no message stays with a caller" do
    test "that was cancelled, running and waiting" do
      instance = start_ready("honest", capacity: 1)
      running = call(fn -> generate(instance, "hold", id: "running") end)
      await_running(instance, "running")
      waiting = call(fn -> generate(instance, "a fig", id: "waiting") end)
      await_status(instance, &(&1.queue.queued == 1))

      assert :ok = StarweaveImage.cancel("waiting", instance: instance)
      assert :ok = StarweaveImage.cancel("running", instance: instance)
      assert {:error, %Error{kind: :cancelled}} = result(running)
      assert {:error, %Error{kind: :cancelled}} = result(waiting)
      assert {:error, :not_found} = StarweaveImage.cancel("running", instance: instance)
    end

    test "whose process crashed" do
      instance = start_ready("crashes_on_poison", max_attempts: 1)
      caller = call(fn -> generate(instance, "poison") end)
      assert {:error, %Error{kind: :sidecar_crashed}} = result(caller, @trials_ms)
      caller = call(fn -> Enum.to_list(stream(instance, "poison")) end)
      assert {:error, %Error{kind: :sidecar_crashed}} = List.last(result(caller))
    end

    test "whose wait was too short; the work is not touched" do
      instance = start_ready("honest")
      id = submit_running(instance, "hold")
      caller = call(fn -> StarweaveImage.await(id, 100, instance: instance) end)
      assert {:error, %Error{kind: :timeout}} = result(caller)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, _} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "whose instance stops; each gets an answer" do
      instance = start_ready("honest", capacity: 2)
      generating = call(fn -> generate(instance, "hold", id: "running") end)
      streaming = call(fn -> Enum.to_list(stream(instance, "hold", id: "watched")) end)
      await_running(instance, "running")
      await_running(instance, "watched")
      waiting = call(fn -> generate(instance, "a fig") end)
      await_status(instance, &(&1.queue.queued == 1))

      pid = os_pid(instance)
      assert :ok = stop_supervised(instance)
      refute alive?(pid)
      assert {:error, %Error{kind: kind}} = result(generating)
      assert kind in [:cancelled, :unavailable]
      assert {:error, %Error{}} = List.last(result(streaming))
      assert {:error, %Error{kind: :unavailable}} = result(waiting)
      assert {:error, %Error{kind: :unavailable}} = generate(instance, "a fig")
    end
  end

  describe "a poison request" do
    test "does not take others down with it: it runs alone in the end" do
      instance = start_ready("crashes_on_poison")
      others = for n <- 1..4, do: submit_running(instance, "hold", seed: n)
      :ok = StarweaveImage.subscribe(hd(others), instance: instance)
      caller = call(fn -> generate(instance, "poison", id: "poison", priority: :interactive) end)
      assert {:error, %Error{kind: :sidecar_crashed}} = result(caller, @trials_ms)

      for id <- others do
        assert {:ok, %Image{attempts: attempts}} =
                 StarweaveImage.await(id, 20_000, instance: instance)

        assert attempts in 2..3
      end
    end
  end

  describe "results" do
    test "may be asked for again and again, until they are too old" do
      instance = start_ready("honest", result_ttl: 2_000)
      {:ok, id} = StarweaveImage.submit("a fig", instance: instance)
      assert {:ok, image} = StarweaveImage.await(id, 20_000, instance: instance)
      assert {:ok, ^image} = StarweaveImage.await(id, 20_000, instance: instance)

      assert await(fn ->
               match?(
                 {:error, %Error{kind: :invalid_request}},
                 StarweaveImage.await(id, 1_000, instance: instance)
               )
             end)

      assert {:ok, %Image{}} = generate(instance, "a fig", id: id)
    end

    test "are kept up to a number, the youngest" do
      instance = start_ready("honest", max_results: 2)

      for id <- ~w(a b c) do
        {:ok, ^id} = StarweaveImage.submit("a fig", id: id, instance: instance)
        assert {:ok, _} = StarweaveImage.await(id, 20_000, instance: instance)
      end

      assert {:error, %Error{kind: :invalid_request}} =
               StarweaveImage.await("a", 1_000, instance: instance)

      assert {:ok, _} = StarweaveImage.await("b", 1_000, instance: instance)
      assert {:ok, _} = StarweaveImage.await("c", 1_000, instance: instance)
    end

    test "are kept up to so many bytes" do
      instance = start_ready("honest", max_result_bytes: 40)

      for id <- ~w(a b c) do
        # Each some 13 bytes long.
        {:ok, ^id} = StarweaveImage.submit("a fig", id: id, seed: 7, instance: instance)
        assert {:ok, _} = StarweaveImage.await(id, 20_000, instance: instance)
      end

      {:ok, _} = StarweaveImage.submit("a fig", id: "d", seed: 7, instance: instance)
      assert {:ok, _} = StarweaveImage.await("d", 20_000, instance: instance)

      assert {:error, %Error{kind: :invalid_request}} =
               StarweaveImage.await("a", 1_000, instance: instance)

      assert {:ok, _} = StarweaveImage.await("b", 1_000, instance: instance)
    end

    test "that were forgotten do not count, also when their id runs again" do
      instance = start_ready("honest", max_results: 1, result_ttl: 2_000)
      {:ok, "a"} = StarweaveImage.submit("a fig", id: "a", instance: instance)
      assert {:ok, _} = StarweaveImage.await("a", 20_000, instance: instance)

      assert await(fn ->
               StarweaveImage.subscribe("a", instance: instance) == {:error, :not_found}
             end)

      "a" = submit_running(instance, "hold", id: "a")
      {:ok, "b"} = StarweaveImage.submit("a fig", id: "b", instance: instance)
      assert {:ok, _} = StarweaveImage.await("b", 20_000, instance: instance)
      assert {:ok, _} = generate(instance, "release")
      assert {:ok, %Image{}} = StarweaveImage.await("a", 20_000, instance: instance)
    end

    test "do not fall with an older one of the same id" do
      instance = start_ready("honest", max_results: 1)
      {:ok, "a"} = StarweaveImage.submit("a fig", id: "a", instance: instance)
      assert {:ok, _} = StarweaveImage.await("a", 20_000, instance: instance)

      for id <- ["b", "a"] do
        {:ok, ^id} = StarweaveImage.submit("a fig", id: id, instance: instance)
        assert {:ok, _} = StarweaveImage.await(id, 20_000, instance: instance)
      end

      assert {:ok, %Image{}} = StarweaveImage.await("a", 1_000, instance: instance)
    end

    test "of owned requests are not kept" do
      instance = start_ready("honest")
      assert {:ok, _} = generate(instance, "a fig", id: "mine")

      assert {:error, %Error{kind: :invalid_request}} =
               StarweaveImage.await("mine", 1_000, instance: instance)
    end
  end

  describe "while a request runs" do
    test "status, models and available? answer in milliseconds" do
      instance = start_ready("honest", capacity: 1)
      id = submit_running(instance, "hold")
      for _ <- 1..10, do: {:ok, _} = StarweaveImage.submit("a fig", instance: instance)

      took =
        for _ <- 1..50 do
          {took, _} =
            :timer.tc(fn ->
              assert %{state: :busy, queue: %{running: 1, queued: 10}} =
                       StarweaveImage.status(instance: instance)

              assert [%{id: "starweave/tiny"}] = StarweaveImage.models(instance: instance)
              assert StarweaveImage.available?(instance: instance)
            end)

          took
        end

      # The median: a busy machine may hold up any one of them.
      assert took |> Enum.sort() |> Enum.at(25) < 20_000
      assert :ok = StarweaveImage.cancel(id, instance: instance)
    end

    test "models can be loaded and unloaded" do
      instance = start_ready("honest")
      submit_running(instance, "hold")
      assert :ok = StarweaveImage.load_model("starweave/tiny", instance: instance)

      assert {:error, %Error{kind: :model_not_found}} =
               StarweaveImage.unload_model("starweave/tiny", instance: instance)
    end
  end
end
