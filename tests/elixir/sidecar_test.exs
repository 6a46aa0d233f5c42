defmodule StarweaveImage.SidecarTest do
  # One misbehaving Python process a test: who dies, who survives, and what the caller gets.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance

  import StarweaveImage.TestOSProcess,
    only: [alive?: 1, await: 1, await_gone: 2, family: 1, signal: 2]

  alias StarweaveImage.{Backoff, Error, Image, Sidecar}
  alias StarweaveImage.Sidecar.Log

  # Everything below goes through this: the application goes on, with the same or with a new process.
  defp assert_works(instance) do
    assert {:ok, %Image{data: "an apple, seed 5", attempts: 1}} =
             StarweaveImage.generate("an apple", seed: 5, instance: instance)
  end

  # The largest that a request may carry.
  defp image, do: <<137, "PNG", 13, 10, 26, 10>> <> :binary.copy("x", 12 * 1024 * 1024 - 8)

  # The request survives the death of the first process, which leaves nothing behind.
  defp assert_replayed(fake, opts \\ [], request \\ []) do
    instance = start_ready(fake, opts)
    victim = os_pid(instance)
    request = [seed: 41, instance: instance] ++ request

    assert {:ok, %Image{data: "a pear, seed 41", seed: 41, attempts: attempts}} =
             StarweaveImage.generate("a pear", request)

    assert [] == await_gone([victim], 5_000)
    assert %{generation: ^attempts, os_pid: survivor} = sidecar(instance)
    assert alive?(survivor) and survivor != victim
    assert_works(instance)
    %{instance: instance, attempts: attempts, victim: victim}
  end

  # The same where the second process does not get ready, and the third is the survivor.
  defp assert_restarted(fake, opts) do
    instance = start_ready(fake, opts)

    assert {:ok, %Image{attempts: attempts}} =
             StarweaveImage.generate("a pear", instance: instance)

    assert %{generation: 3} = sidecar(instance)
    assert_works(instance)
    %{attempts: attempts}
  end

  describe "an honest process" do
    test "sees its command line, descriptors 0 to 4 and nothing of the application's secrets" do
      System.put_env("STARWEAVE_TEST_SECRET", "s3cret")
      System.put_env("STARWEAVE_TEST_SHARED", "shared")
      on_exit(fn -> Enum.each(~w(SECRET SHARED), &System.delete_env("STARWEAVE_TEST_#{&1}")) end)
      instance = start_ready("honest", env: ["STARWEAVE_TEST_SHARED"])

      report = report(instance)
      assert report["descriptors"] == [0, 1, 2, 3, 4]
      assert [script, "port", "--log-socket"] = report["arguments"]
      assert Path.basename(script) == "run.py"
      assert "STARWEAVE_TEST_SHARED" in report["environment"]
      assert "PATH" in report["environment"]
      python = Enum.filter(report["environment"], &String.starts_with?(&1, "PYTHON"))
      assert python == ["PYTHONUNBUFFERED"]
      refute "STARWEAVE_TEST_SECRET" in report["environment"]
      refute "MIX_ENV" in report["environment"]
    end

    test "is told its generation, which grows with each start" do
      instance = start_ready("honest")
      assert report(instance)["generation"] == 1

      for generation <- 2..3 do
        victim = os_pid(instance)
        signal(victim, "KILL")
        assert await(fn -> sidecar(instance)[:generation] == generation end)
        await_state(instance, :ready)
        assert report(instance)["generation"] == generation
        refute alive?(victim)
      end
    end

    test "is not taken for silent because its owner stood still" do
      instance = start_ready("honest", heartbeat_timeout: 2_000)
      pid = os_pid(instance)
      id = submit_running(instance, "hold")
      :ok = :sys.suspend(owner(instance))
      # What the owner's clock must not count is this time itself.
      Process.sleep(3_000)
      :ok = :sys.resume(owner(instance))
      assert_works(instance)
      assert os_pid(instance) == pid
      assert :ok = StarweaveImage.cancel(id, instance: instance)
    end

    test "ends with its instance, and by `shutdown`" do
      instance = start_ready("honest")
      pid = os_pid(instance)
      assert :ok = stop_supervised(instance)
      refute alive?(pid)
      assert StarweaveImage.status(instance: instance).state == :down
    end

    test "finishes within the grace period what runs when its instance stops" do
      instance = start_ready("finishes_at_shutdown", shutdown_grace: 5_000)
      id = "finishes-#{System.unique_integer([:positive])}"

      caller =
        Task.async(fn -> StarweaveImage.generate("hold", seed: 3, id: id, instance: instance) end)

      await_running(instance, id)
      assert :ok = stop_supervised(instance)
      assert {:ok, %Image{data: "hold, seed 3"}} = Task.await(caller)
    end

    test "ends when its owner is killed, and the request goes to the next one" do
      instance = start_ready("honest")
      victim = os_pid(instance)
      id = submit_running(instance, "hold")

      Process.exit(owner(instance), :kill)
      assert [] == await_gone([victim], 5_000)
      await_running(instance, id)
      assert os_pid(instance) != victim

      assert_works(instance)
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 10_000, instance: instance)
    end
  end

  describe "the role" do
    defp preloaded(instance), do: report(instance)["config"]["preload"]

    defp restart(instance) do
      %{generation: generation, os_pid: victim} = sidecar(instance)
      signal(victim, "KILL")

      assert await(fn ->
               match?(%{generation: g, state: :ready} when g > generation, sidecar(instance))
             end)
    end

    test "of a standby is to load nothing at its next start, until it is active" do
      instance = start_ready("honest", preload: ["starweave/tiny"])
      pid = os_pid(instance)
      assert preloaded(instance) == ["starweave/tiny"]

      log =
        capture_log(fn ->
          assert :ok = Sidecar.set_role(owner(instance), :standby)
          # It goes on as it is, and takes what it is asked.
          assert preloaded(instance) == ["starweave/tiny"]
          assert os_pid(instance) == pid
          restart(instance)
        end)

      assert log =~ "image sidecar 1 is standby now"
      assert log =~ "image sidecar 1 (standby) is ready"
      assert preloaded(instance) == []

      assert :ok = Sidecar.set_role(owner(instance), :active)
      restart(instance)
      assert preloaded(instance) == ["starweave/tiny"]
    end

    test "may be that of a standby from the start" do
      log =
        capture_log(fn ->
          instance = start("honest", preload: ["starweave/tiny"], standby: 1)

          all = fn ->
            Enum.map(StarweaveImage.status(instance: instance).sidecars, &{&1.role, &1.state})
          end

          assert await(fn -> all.() == [active: :ready, standby: :ready] end)
        end)

      assert log =~ "image sidecar 2 (standby) is ready"
    end
  end

  describe "output" do
    test "to stdout from Python, from C and from a child reaches Logger and not the frames" do
      log =
        capture_log(fn ->
          instance = start_ready("prints")
          pid = os_pid(instance)
          assert_works(instance)
          assert os_pid(instance) == pid
          stop_supervised!(instance)
        end)

      for line <- ["stdout of Python", "stdout of C", "stdout of a child", "stderr of a child"],
          do: assert(log =~ ~r/image sidecar 1 \| #{line}$/m)
    end

    test "that floods stderr neither blocks the process nor costs a line each" do
      log =
        capture_log(fn ->
          instance = start_ready("floods_stderr")
          pid = os_pid(instance)
          assert_works(instance)
          assert os_pid(instance) == pid
          stop_supervised!(instance)
        end)

      assert log =~ ~r/more lines were dropped/
      lines = log |> String.split("flood of forty-nine bytes") |> length()
      assert lines > 100 and lines < 50_000
    end
  end

  describe "an end" do
    test "by kill in the middle of a request: it is sent again with the same seed" do
      instance = start_ready("honest")
      victim = os_pid(instance)
      id = submit_running(instance, "hold", seed: 77)
      :ok = StarweaveImage.subscribe(id, instance: instance)

      signal(victim, "KILL")
      assert_receive {:starweave_image, ^id, {:queued, %{attempt: 2}}}, 10_000
      assert_receive {:starweave_image, ^id, {:progress, %{attempt: 2}}}, 10_000
      assert {:ok, _} = StarweaveImage.generate("release", instance: instance)

      assert {:ok, %Image{data: "hold, seed 77", attempts: 2}} =
               StarweaveImage.await(id, 10_000, instance: instance)

      refute alive?(victim)
    end

    test "in the middle of a frame" do
      assert %{attempts: 2} = assert_replayed("dies_in_a_frame")
    end

    test "under a request once" do
      instance = start_ready("crashes_on_poison")

      assert {:ok, %Image{data: "once, seed 8", attempts: 2}} =
               StarweaveImage.generate("once", seed: 8, instance: instance)
    end

    test "under a request every time: it is given up, and the next request works" do
      instance = start_ready("crashes_on_poison")

      assert {:error, %Error{kind: :sidecar_crashed, retryable?: false} = error} =
               StarweaveImage.generate("poison", instance: instance)

      [_, deaths] = Regex.run(~r/ended under this request (\d+) times/, error.message)
      assert String.to_integer(deaths) in 4..9
      assert_works(instance)
      assert sidecar(instance).generation == String.to_integer(deaths) + 1
    end

    test "leaves no child of the process behind, with and without its frames" do
      instance = start_ready("leaves_a_child", heartbeat_timeout: 6_000)
      first = os_pid(instance)
      assert {:ok, %Image{attempts: 3}} = StarweaveImage.generate("a pear", instance: instance)
      assert family(first) == []
      assert [only] = family(os_pid(instance))
      assert only == os_pid(instance)
      assert_works(instance)
    end
  end

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
            assert %{attempts: 2} = assert_replayed(unquote(fake), heartbeat_timeout: 3_000)
          end)

        assert log =~ ~r/image sidecar 1 \(generation 1\) is killed: no heartbeat for \d{4} ms/
      end
    end

    test "is stopped by `hello`, before it is ready, is killed at the start timeout" do
      # Longer than an honest one takes on a busy machine.
      opts = [start_timeout: 4_000, heartbeat_timeout: 3_000]

      log =
        capture_log(fn -> assert %{attempts: 2} = assert_restarted("stops_at_hello", opts) end)

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
          assert %{attempts: 2} = assert_replayed("makes_no_step", stall_timeout: 1_000)
        end)

      assert log =~ ~r/is killed: request \S+ has not moved for over 1.0 s while denoising/
    end

    test "hangs on the device is killed after a multiple of what a pass takes" do
      log =
        capture_log(fn ->
          opts = [stall_floor: 500, stall_timeout: 600_000]
          assert %{attempts: 2} = assert_replayed("hangs_on_the_device", opts)
        end)

      assert log =~ "is killed: the device has been at one pass for over 0.5 s"
    end

    test "hangs in a load is killed at the load timeout" do
      log =
        capture_log(fn ->
          assert %{attempts: 2} = assert_replayed("hangs_in_a_load", load_timeout: 1_000)
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
      assert %{attempts: 2} = assert_replayed("forgets_to_work", stall_timeout: 1_000)
    end

    test "loses a request is killed, its heartbeat notwithstanding" do
      assert %{attempts: 2} = assert_replayed("loses_requests", heartbeat_timeout: 5_000)
    end

    test "answers twice is heard once, and killed" do
      instance = start_ready("answers_twice")
      victim = os_pid(instance)
      {:ok, id} = StarweaveImage.submit("a fig", seed: 2, instance: instance)

      assert {:ok, %Image{data: "a fig, seed 2"}} =
               StarweaveImage.await(id, 10_000, instance: instance)

      assert [] == await_gone([victim], 5_000)
      assert {:ok, [%Image{}]} = StarweaveImage.await_many(id, 10_000, instance: instance)
      assert StarweaveImage.status(instance: instance).queue.running == 0
      assert mailbox() == []
    end

    for broken <- [
          "progress before accepted",
          "accepts other seeds",
          "accepted again",
          "done without images",
          "image nobody asked for",
          "second image first",
          "image of another seed",
          "image of another size",
          "image in another format",
          "parts that disagree",
          "part over the size",
          "part with a gap",
          "empty part",
          "large part",
          "checksum in capitals",
          "preview nobody asked for",
          "progress of a second image",
          "models in the middle"
        ] do
      test "breaks a promise (#{broken}) is killed, and its request done by the next" do
        instance = start_ready("breaks_promises")
        victim = os_pid(instance)

        log =
          capture_log(fn ->
            assert {:ok, %Image{data: unquote(broken <> ", seed 41"), attempts: 2}} =
                     StarweaveImage.generate(unquote(broken), seed: 41, instance: instance)
          end)

        assert log =~ "(generation 1) is killed: it sent" or log =~ "is killed: it accepted"
        assert [] == await_gone([victim], 5_000)
        assert_works(instance)
      end
    end

    for broken <- ["done again", "error after done", "image after done"] do
      test "goes on about a request after its end (#{broken}) is killed" do
        instance = start_ready("breaks_promises")
        victim = os_pid(instance)

        assert {:ok, %Image{attempts: 1}} =
                 StarweaveImage.generate(unquote(broken), seed: 41, instance: instance)

        assert [] == await_gone([victim], 5_000)
        assert {:ok, %Image{}} = StarweaveImage.generate("an apple", seed: 5, instance: instance)
        assert sidecar(instance).generation == 2
      end
    end

    test "refuses a message with the id of a request that goes on has not ended it" do
      instance = start_ready("refuses_without_an_end")
      pid = os_pid(instance)
      assert_works(instance)
      assert_works(instance)
      assert os_pid(instance) == pid
    end

    test "answers for ids and generations that are none is not heard" do
      instance = start_ready("answers_for_nobody")
      pid = os_pid(instance)
      assert_works(instance)
      assert {:error, :not_found} = StarweaveImage.subscribe("nobody", instance: instance)
      assert_works(instance)
      assert os_pid(instance) == pid
    end

    test "sends what is no message is killed each time" do
      assert %{attempts: 6} = assert_replayed("sends_junk", max_attempts: 6)
    end

    test "announces a frame over the limit, or of no bytes, is killed before it is read" do
      assert %{attempts: 4} = assert_replayed("sends_wrong_sizes", max_attempts: 4)
    end

    test "sends an image with a wrong checksum is killed" do
      assert %{attempts: 2} = assert_replayed("wrong_checksum")
    end

    test "sends the parts of an image out of order is killed" do
      assert %{attempts: 2} = assert_replayed("wrong_order")
    end

    test "is of another version of the protocol is killed" do
      instance = start("wrong_version")
      assert await_state(instance, :down).error == "it speaks version 2 of the protocol"
    end
  end

  describe "a process that reads nothing" do
    test "freezes neither its owner nor the queue, and is killed" do
      instance = start_ready("reads_nothing", heartbeat_timeout: 6_000)
      victim = os_pid(instance)
      owner = owner(instance)

      {:ok, id} = StarweaveImage.submit("a pear", seed: 4, image: image(), instance: instance)
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
      {:ok, id} = StarweaveImage.submit("a pear", image: image(), instance: instance)
      # The queue casts before it replies, and the owner answers after what was cast.
      _ = :sys.get_state(owner(instance))
      signal(victim, "KILL")
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 30_000, instance: instance)
      assert_works(instance)
    end

    test "does not keep its instance from stopping" do
      instance = start_ready("reads_nothing", shutdown_grace: 200, heartbeat_timeout: 60_000)
      pid = os_pid(instance)
      {:ok, _} = StarweaveImage.submit("a pear", image: image(), instance: instance)
      {took, :ok} = :timer.tc(fn -> stop_supervised(instance) end)
      assert took < 10_000_000
      refute alive?(pid)
    end
  end

  describe "an image of 12 MiB" do
    test "arrives whole" do
      instance = start_ready("honest")

      inputs = [image: image(), mask: image(), instance: instance]
      assert {:ok, %Image{}} = StarweaveImage.generate("a pear", inputs)

      assert_works(instance)
    end
  end

  describe "the log socket" do
    # Its owner, as a sidecar's owner is: it ends when it is told to.
    defp log_reader do
      test = self()

      owner =
        spawn(fn ->
          send(test, {:reader, Log.start_link(__MODULE__, 3)})
          receive do: (:end -> exit(:shutdown))
        end)

      assert_receive {:reader, {:ok, %{reader: reader, socket: path}}}, 10_000
      %{owner: owner, reader: Process.monitor(reader), path: path}
    end

    test "takes every line to the last, also when its owner ends first" do
      log =
        capture_log(fn ->
          %{owner: owner, reader: reader, path: path} = log_reader()
          {:ok, socket} = :gen_tcp.connect({:local, path}, 0, [:binary])
          :ok = :gen_tcp.send(socket, "the first line\n\xFF is no text\n")
          assert await(fn -> not File.exists?(Path.dirname(path)) end)
          send(owner, :end)
          :ok = :gen_tcp.send(socket, "the line after\nthe last words\n")
          :ok = :gen_tcp.close(socket)
          assert_receive {:DOWN, ^reader, _, _, {:shutdown, _}}, 10_000
        end)

      for words <- [
            "the first line",
            "\\xFF is no text",
            "the line after",
            "the last words"
          ],
          do: assert(log =~ "image sidecar 3 | " <> words)
    end

    test "is gone when nobody connected and its owner ends" do
      %{owner: owner, reader: reader, path: path} = log_reader()
      assert Bitwise.band(File.stat!(Path.dirname(path)).mode, 0o777) == 0o700
      send(owner, :end)
      assert_receive {:DOWN, ^reader, _, _, _}, 10_000
      refute File.exists?(Path.dirname(path))
    end
  end

  describe "pure parts" do
    test "the pause between starts grows to its limit, half of it by chance" do
      assert Backoff.pause(0, {500, 30_000}) == 0

      for failures <- 1..200, first <- [1, 7, 500], most <- [1, 500, 30_000] do
        full = min(most, first * Integer.pow(2, min(failures - 1, 20)))
        pause = Backoff.pause(failures, {first, most})
        assert pause in div(full, 2)..full
      end

      pauses = for _ <- 1..100, do: Backoff.pause(6, {500, 30_000})
      assert length(Enum.uniq(pauses)) > 50
    end

    test "only what is on the list or named may be seen" do
      names = [
        "PATH",
        "HF_TOKEN",
        "LC_ALL",
        "SECRET_KEY_BASE",
        "DATABASE_URL",
        "MINE",
        "PYTHONPATH"
      ]

      assert Sidecar.Python.allowed_env(names, ["MINE"]) == ["PATH", "HF_TOKEN", "LC_ALL", "MINE"]

      # Where models are, by all names that huggingface_hub reads, and whether it may ask for them.
      hub =
        ~w(HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_XET_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE)

      assert Sidecar.Python.allowed_env(hub ++ ["HF_API_KEY"], []) == hub
    end

    @config [stall_timeout: 1_000, stall_floor: 100, load_timeout: 9_000]

    defp beat(running, more \\ %{}), do: Map.merge(%{running: running}, more)

    defp running(phase, age, more \\ %{}),
      do: Map.merge(%{id: "r1", phase: phase, step_age_ms: age, step_ms: 0, waits: false}, more)

    defp stuck(beat), do: Sidecar.Health.stuck(beat, @config)

    test "a pass of a known kind has ten times its time, and at least the floor" do
      pass = fn age, usual -> %{age_ms: age, usual_ms: usual, known: true} end
      assert stuck(beat([], %{device_work: nil})) == nil
      assert stuck(beat([], %{device_work: pass.(100, 0)})) == nil
      assert stuck(beat([], %{device_work: pass.(101, 10)})) =~ "over 0.1 s"
      assert stuck(beat([], %{device_work: pass.(500, 50)})) == nil
      assert stuck(beat([], %{device_work: pass.(501, 50)})) =~ "over 0.5 s"
      assert stuck(beat([], %{device_work: pass.(50_000, 5_000)})) == nil
    end

    test "one of a kind that was not seen before has the stall timeout, or ten times the estimate" do
      pass = fn age, usual -> %{age_ms: age, usual_ms: usual, known: false} end
      assert stuck(beat([], %{device_work: pass.(1_000, 0)})) == nil
      assert stuck(beat([], %{device_work: pass.(1_001, 0)})) =~ "over 1.0 s"
      assert stuck(beat([], %{device_work: pass.(4_000, 400)})) == nil
      assert stuck(beat([], %{device_work: pass.(4_001, 400)})) =~ "over 4.0 s"
    end

    test "who waits for its turn may wait for long, whoever works is judged alone" do
      waits = running("denoising", 1_000_000, %{waits: true, step_ms: 5})
      work = %{device_work: %{age_ms: 3, usual_ms: 5, known: true}}
      assert stuck(beat([waits, waits], work)) == nil
      assert stuck(beat([waits, running("encoding", 999)])) == nil
      assert stuck(beat([waits], %{loads: [%{model: "a/b", age_ms: 8_999}]})) == nil
      assert stuck(beat([waits, running("encoding", 1_001)], work)) =~ "r1 has not moved"

      assert stuck(beat([running("denoising", 0), running("decoding", 1_001)])) =~
               "while decoding"
    end

    test "a picture's further steps have ten times the longest, its first the stall timeout" do
      assert stuck(beat([running("denoising", 1_000)])) == nil
      assert stuck(beat([running("denoising", 1_001)])) =~ "over 1.0 s while denoising"
      assert stuck(beat([running("denoising", 100, %{step_ms: 1})])) == nil
      assert stuck(beat([running("denoising", 101, %{step_ms: 1})])) =~ "over 0.1 s"
      assert stuck(beat([running("denoising", 300, %{step_ms: 30})])) == nil
      assert stuck(beat([running("denoising", 301, %{step_ms: 30})])) =~ "over 0.3 s"
      # What comes after the last step is work of another kind.
      assert stuck(beat([running("encoding", 999, %{step_ms: 1})])) == nil
    end

    test "who was told to stop has its own limit, from then on, for its own work" do
      outstays = fn request, told, now ->
        Sidecar.Health.outstays(beat([request]), told, now, cancel_timeout: 100)
      end

      for phase <- ~w(loading denoising decoding encoding) do
        request = running(phase, 1_000)
        assert outstays.(request, %{}, 1_000) == nil
        assert outstays.(request, %{"r2" => 0}, 1_000) == nil
        assert outstays.(request, %{"r1" => 900}, 1_000) == nil
        assert outstays.(request, %{"r1" => 899}, 1_000) =~ "over 0.1 s while #{phase}"
        assert outstays.(%{request | waits: true}, %{"r1" => 0}, 1_000) == nil
        # The pass that it waited for is over just now.
        assert outstays.(running(phase, 100), %{"r1" => 0}, 1_000) == nil
        assert outstays.(Map.delete(request, :waits), %{"r1" => 0}, 1_000) =~ "r1 was told"
      end
    end

    test "a load has the load timeout, also one that no request waits for" do
      load = fn age -> %{loads: [%{model: "a/b", age_ms: age}]} end
      assert stuck(beat([], load.(9_000))) == nil
      assert stuck(beat([], load.(9_001))) =~ "the load of a/b has taken over 9.0 s"
      assert stuck(beat([running("loading", 9_000)])) == nil
      assert stuck(beat([running("loading", 9_001)])) =~ "while loading"
    end

    test "all who wait for nobody are stuck" do
      waits = fn age -> running("denoising", age, %{waits: true}) end
      assert stuck(beat([waits.(1_000), waits.(5_000)])) == nil
      assert stuck(beat([waits.(1_001), waits.(5_000)])) =~ "nothing is worked on"
      assert stuck(beat([waits.(1_001), running("encoding", 0)])) == nil
    end

    test "of an older process without these fields each request is judged by its age" do
      old = &Map.delete(running("denoising", &1), :waits)
      assert stuck(beat([old.(1_000)])) == nil
      assert stuck(beat([old.(1_001)])) =~ "has not moved"
    end
  end
end
