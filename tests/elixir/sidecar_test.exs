defmodule StarweaveImage.SidecarTest do
  # One misbehaving Python process a test: who dies, who survives, and what the caller gets.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance

  import StarweaveImage.TestOSProcess,
    only: [alive?: 1, await: 1, await_gone: 2, family: 1, signal: 2]

  alias StarweaveImage.{Backoff, Error, Image, Sidecar}
  alias StarweaveImage.Sidecar.Log

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
      :telemetry.listen()
      instance = start_ready("honest")
      pid = os_pid(instance)
      assert :ok = stop_supervised(instance)
      refute alive?(pid)

      assert_received {:telemetry, [:starweave, :image, :sidecar, :stop], %{duration: _},
                       %{instance: ^instance, os_pid: ^pid, reason: "it was told to stop"}}

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
      assert 2 == assert_replayed("dies_in_a_frame")
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

    for prompt <- ["lets go", "keeps hold"] do
      test "leaves no child of the process behind (one that #{prompt} of its frames)" do
        instance = start_ready("leaves_a_child", heartbeat_timeout: 5_000)
        first = os_pid(instance)

        assert {:ok, %Image{attempts: 2}} =
                 StarweaveImage.generate(unquote(prompt), instance: instance)

        assert family(first) == []
        assert [only] = family(os_pid(instance))
        assert only == os_pid(instance)
        assert_works(instance)
      end
    end
  end

  describe "an image of 12 MiB" do
    test "arrives whole" do
      instance = start_ready("honest")

      inputs = [image: large_image(), mask: large_image(), instance: instance]
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
  end
end
