defmodule StarweaveImage.SidecarStuckTest do
  # One process a test that hangs, falls silent or reads nothing: it is killed, and its request done by the next.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance

  import StarweaveImage.TestOSProcess,
    only: [alive?: 1, await: 1, await_gone: 2, signal: 2]

  alias StarweaveImage.{Error, Image}

  describe "a process that" do
    test "ignores SIGTERM and `shutdown` is killed when its instance stops" do
      instance = start_ready("ignores_sigterm", shutdown_grace: 200)
      pid = os_pid(instance)
      {took, :ok} = :timer.tc(fn -> stop_supervised(instance) end)
      refute alive?(pid)
      assert took < 10_000_000
    end

    test "never speaks is killed, and the next one too, and callers are told at once" do
      instance = start("never_speaks", heartbeat_timeout: 300, backoff_min: 10)
      status = await_state(instance, :down)
      assert status.error =~ "no heartbeat for"

      assert {:error, %Error{kind: :unavailable}} =
               StarweaveImage.generate("a", instance: instance)

      assert await(fn -> sidecar(instance)[:generation] >= 3 end)
    end

    test "falls silent while it starts is left alone until the start timeout" do
      instance = start_ready("silent_start", heartbeat_timeout: 4_000)
      assert sidecar(instance).generation == 1
      assert_works(instance)
    end

    test "never gets ready is killed at the start timeout, its heartbeat notwithstanding" do
      instance = start("never_ready", start_timeout: 3_000)

      assert await(fn -> os_pid(instance) end)
      pid = os_pid(instance)
      assert StarweaveImage.status(instance: instance).state == :starting
      refute StarweaveImage.available?(instance: instance)

      assert await_state(instance, :down).error == "it was not ready after 3000 ms"
      assert [] == await_gone([pid], 5_000)
    end

    for {fake, moment} <- [
          {"stops", "in the middle of a request"},
          {"stops_at_ready", "when it is ready"},
          {"stops_when_accepted", "between a request and its first step"},
          {"stops_while_loading", "while it loads a model"},
          {"stops_in_a_frame", "in the middle of a frame"}
        ] do
      test "is stopped #{moment} is killed, and its request replayed" do
        log =
          capture_log(fn ->
            assert 2 == assert_replayed(unquote(fake), heartbeat_timeout: 3_000)
          end)

        assert log =~ ~r/image sidecar 1 \(generation 1\) is killed: no heartbeat for \d{4} ms/
      end
    end

    test "is stopped by `hello`, before it is ready, is killed at the start timeout" do
      log =
        capture_log(fn ->
          # Longer than an honest one takes on a busy machine.
          opts = [start_timeout: 4_000, heartbeat_timeout: 3_000]
          instance = start_ready("stops_at_hello", opts)

          assert {:ok, %Image{attempts: 2}} =
                   StarweaveImage.generate("a pear", instance: instance)

          assert %{generation: 3} = sidecar(instance)
          assert_works(instance)
        end)

      assert log =~ "(generation 2) is killed: it was not ready after 4000 ms"
    end

    test "is stopped by `shutdown` is killed without using up a long grace period" do
      instance =
        start_ready("stops_at_shutdown", shutdown_grace: 60_000, heartbeat_timeout: 3_000)

      pid = os_pid(instance)
      {took, :ok} = :timer.tc(fn -> stop_supervised(instance) end)
      refute alive?(pid)
      assert took < 30_000_000
    end

    test "makes no first step is killed, its heartbeat notwithstanding" do
      log =
        capture_log(fn ->
          assert 2 == assert_replayed("makes_no_step", stall_timeout: 1_000)
        end)

      assert log =~ ~r/is killed: request \S+ has not moved for over 1.0 s while denoising/
    end

    test "hangs on the device is killed after a multiple of what a pass takes" do
      log =
        capture_log(fn ->
          opts = [stall_floor: 500, stall_timeout: 600_000]
          assert 2 == assert_replayed("hangs_on_the_device", opts)
        end)

      assert log =~ "is killed: the device has been at one pass for over 0.5 s"
    end

    test "hangs in a load is killed at the load timeout" do
      log =
        capture_log(fn ->
          assert 2 == assert_replayed("hangs_in_a_load", load_timeout: 1_000)
        end)

      assert log =~ "is killed: the load of starweave/tiny has taken over 1.0 s"
    end

    test "does not get done with one request is killed, though others move" do
      instance = start_ready("never_encodes", stall_timeout: 2_000)
      held = submit_running(instance, "hold")
      stuck = submit_running(instance, "stuck")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(stuck, 30_000, instance: instance)
      await_running(instance, held)
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(held, 10_000, instance: instance)
    end

    test "goes on with one that was cancelled is killed, and the others are done by the next" do
      log =
        capture_log(fn ->
          instance = start_ready("goes_on_after_cancel", cancel_timeout: 500, capacity: 3)
          victim = os_pid(instance)
          held = submit_running(instance, "hold")
          waits = submit_running(instance, "waits")
          assert :ok = StarweaveImage.cancel(waits, instance: instance)
          stuck = submit_running(instance, "stuck")

          # As long as it is wanted, and for as long as the one that waits has not stopped, it is left alone.
          assert alive?(victim)
          assert :ok = StarweaveImage.cancel(stuck, instance: instance)
          assert [] == await_gone([victim], 10_000)
          await_running(instance, held)
          assert {:ok, _} = StarweaveImage.generate("release", instance: instance)

          assert {:ok, %Image{attempts: 2}} =
                   StarweaveImage.await(held, 10_000, instance: instance)

          assert %{running: 0, queued: 0} = StarweaveImage.status(instance: instance).queue
          assert_works(instance)
        end)

      assert log =~
               ~r/request \S+ was told to stop, and has worked on for over 0.5 s while encoding/
    end

    test "works on nothing while all wait is killed" do
      assert 2 == assert_replayed("forgets_to_work", stall_timeout: 1_000)
    end

    test "loses a request is killed, its heartbeat notwithstanding" do
      assert 2 == assert_replayed("loses_requests", heartbeat_timeout: 5_000)
    end
  end

  describe "a process that reads nothing" do
    test "freezes neither its owner nor the queue, and is killed" do
      instance = start_ready("reads_nothing", heartbeat_timeout: 6_000)
      victim = os_pid(instance)
      owner = owner(instance)

      {:ok, id} =
        StarweaveImage.submit("a pear", seed: 4, image: large_image(), instance: instance)

      assert StarweaveImage.status(instance: instance).queue.running == 1

      for _ <- 1..20 do
        {took, _} = :timer.tc(fn -> StarweaveImage.status(instance: instance) end)
        assert took < 500_000
        {took, _} = :timer.tc(fn -> :sys.get_state(owner) end)
        assert took < 500_000
      end

      assert alive?(victim)
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 30_000, instance: instance)
      refute alive?(victim)
      assert_works(instance)
    end

    test "and is killed by someone else, is replaced at once" do
      instance = start_ready("reads_nothing", heartbeat_timeout: 60_000)
      victim = os_pid(instance)
      {:ok, id} = StarweaveImage.submit("a pear", image: large_image(), instance: instance)
      # The queue casts before it replies, and the owner answers after what was cast.
      _ = :sys.get_state(owner(instance))
      signal(victim, "KILL")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 30_000, instance: instance)
      assert_works(instance)
    end

    test "does not keep its instance from stopping" do
      instance = start_ready("reads_nothing", shutdown_grace: 200, heartbeat_timeout: 60_000)
      pid = os_pid(instance)
      {:ok, _} = StarweaveImage.submit("a pear", image: large_image(), instance: instance)
      {took, :ok} = :timer.tc(fn -> stop_supervised(instance) end)
      assert took < 10_000_000
      refute alive?(pid)
    end
  end
end
