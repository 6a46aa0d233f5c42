defmodule StarweaveImage.SupervisionTest do
  # Instances that cannot start, or may not: the application is up all the same and says why.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [alive?: 1, await: 1, signal: 2]

  alias StarweaveImage.{Error, Image}

  @moduletag :tmp_dir

  # It is down, says why in one sentence, and answers at once without touching the application.
  defp assert_down(instance, reason) do
    status = await_state(instance, :down)
    assert status.error =~ reason
    assert [_one_line] = String.split(status.error, "\n")
    refute status.error =~ ~r{/\w+/|Traceback|File "}
    refute StarweaveImage.available?(instance: instance)

    for ask <- [
          &StarweaveImage.generate("a fig", instance: &1),
          &StarweaveImage.submit("a fig", instance: &1),
          &StarweaveImage.load_model("starweave/tiny", instance: &1),
          &(StarweaveImage.stream("a fig", instance: &1) |> Enum.to_list() |> hd())
        ] do
      {took, answer} = :timer.tc(fn -> ask.(instance) end)
      assert {:error, %Error{kind: :unavailable, retryable?: true} = error} = answer
      assert error.message =~ reason
      assert took < 1_000_000
    end

    assert instance |> Module.concat("Supervisor") |> Process.whereis() |> Process.alive?()
    assert mailbox() == []
    status
  end

  describe "a sidecar that cannot start" do
    test "for want of a Python", %{tmp_dir: folder} do
      for python <- [Path.join(folder, "nothing"), "no-such-command", folder] do
        instance = start(nil, python: python)
        assert_down(instance, "interpreter that the option `python` names")
        assert StarweaveImage.models(instance: instance) == []
      end
    end

    test "for the file is not executable", %{tmp_dir: folder} do
      python = executable(folder, "#!/bin/sh\nexit 0\n")
      File.chmod!(python, 0o644)
      assert_down(start(nil, python: python), "interpreter that the option `python` names")
    end

    test "for the file is no program, or its own interpreter is missing", %{tmp_dir: folder} do
      for content <- ["\x7fELF not really", "#!/no/such/interpreter\n"] do
        instance = start(nil, python: executable(folder, content))
        status = assert_down(instance, ~r/./)
        assert status.error =~ ~r/mix image.setup|the log has its last words/
      end
    end

    test "for it refuses its configuration: the reason is what it says of it" do
      assert_down(start("refuses_hello"), "config.device must be one of auto, cpu")
    end

    test "for want of a package, which it names" do
      instance = start("reports_missing_package")
      assert_down(instance, "the Python package diffusers is missing: run `mix image.setup`")
    end

    for {code, sentence} <- [
          {69, "a Python package is missing or cannot be imported: run `mix image.setup`"},
          {64, "the Python process refused its command line"},
          {65, "the Python process lost the framing"},
          {66, "the Python process refused the handshake"},
          {70, "the Python process ended with status 70"},
          {0, "the Python process ended by itself"}
        ] do
      test "for it ends with #{code}", %{tmp_dir: folder} do
        instance = start(nil, python: executable(folder, "#!/bin/sh\nexit #{unquote(code)}\n"))
        assert_down(instance, unquote(sentence))
      end
    end

    test "is tried again with growing pauses", %{tmp_dir: folder} do
      starts = Path.join(folder, "starts")

      python = executable(folder, "#!/bin/sh\necho >>#{starts}\nexit 69\n")

      count = fn -> starts |> File.read!() |> byte_size() end

      log =
        capture_log(fn ->
          began = System.monotonic_time(:millisecond)
          instance = start(nil, python: python, backoff_min: 100, backoff_max: 1_000)
          assert await(fn -> File.exists?(starts) and count.() >= 5 end)
          took = System.monotonic_time(:millisecond) - began
          # At the least: the halves of 100, 200, 400 and 800 ms.
          assert took >= 750
          assert_down(instance, "mix image.setup")
          stop_supervised!(instance)
        end)

      assert log =~ ~r/image sidecar 1 ended: a Python package is missing.*next start in \d+ ms/
    end

    test "leaves no process and no file behind, however often it is tried", %{tmp_dir: folder} do
      instance = start(nil, python: executable(folder, "\x7fELF not really"), backoff_max: 20)
      assert await(fn -> sidecar(instance)[:generation] >= 60 end)

      # Its supervisor, and for each log reader that has not ended yet one more: a reader looks four times a second
      # whether it may, and a start is tried every 10 to 20 ms.
      assert instance |> owner() |> Process.info(:links) |> elem(1) |> length() <= 30
    end

    test "starts as soon as it can", %{tmp_dir: folder} do
      python = Path.join(folder, "python")
      instance = start(nil, python: python, backoff_max: 100)
      assert_down(instance, "interpreter that the option `python` names")

      File.ln_s!(fake("honest"), python)
      status = await_state(instance, :ready)
      assert status.error == nil
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
    end

    test "does not keep its instance from stopping", %{tmp_dir: folder} do
      instance =
        start(nil, python: executable(folder, "#!/bin/sh\nexit 69\n"), backoff_min: 60_000)

      await_state(instance, :down)
      {took, :ok} = :timer.tc(fn -> stop_supervised(instance) end)
      assert took < 5_000_000
    end
  end

  describe "a sidecar that worked" do
    test "and dies: requests wait for the next one" do
      instance = start_ready("honest")
      signal(os_pid(instance), "KILL")
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
    end

    test "and cannot start twice: what waits is done all the same", %{tmp_dir: folder} do
      starts = Path.join(folder, "starts")
      File.write!(starts, "")

      python =
        executable(folder, """
        #!/bin/sh
        echo >>#{starts}
        case $(wc -l <#{starts}) in 2 | 3) exit 69 ;; esac
        exec #{fake("honest")} "$@"
        """)

      instance = start(nil, python: python)
      await_state(instance, :ready)
      id = submit_running(instance, "hold")
      signal(os_pid(instance), "KILL")
      assert await(fn -> match?(%{generation: 4}, sidecar(instance)) end)
      await_running(instance, id)
      assert {:ok, %Image{}} = StarweaveImage.generate("release", instance: instance)
      assert {:ok, %Image{attempts: 2}} = StarweaveImage.await(id, 20_000, instance: instance)
    end

    test "and cannot start any more: what waits is answered, and later requests at once", %{
      tmp_dir: folder
    } do
      python = Path.join(folder, "python")
      File.ln_s!(fake("honest"), python)
      instance = start(nil, python: python, backoff_max: 50)
      await_state(instance, :ready)
      running = submit_running(instance, "hold")

      File.rm!(python)
      signal(os_pid(instance), "KILL")

      assert {:error, %Error{kind: :unavailable}} =
               StarweaveImage.await(running, 20_000, instance: instance)

      assert_down(instance, "interpreter that the option `python` names")

      File.ln_s!(fake("honest"), python)
      await_state(instance, :ready)
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
    end

    test "is one of two: the other one takes the work" do
      instance = start("honest", sidecars: 2, capacity: 1, backoff_min: 60_000)

      assert await(fn ->
               states = for s <- StarweaveImage.status(instance: instance).sidecars, do: s.state
               states == [:ready, :ready]
             end)

      a = submit(instance, "hold")
      b = submit(instance, "hold")
      assert await(fn -> length(running(instance)) == 2 end)
      assert Enum.sort(running(instance)) == Enum.sort([a, b])

      [first, second] = StarweaveImage.status(instance: instance).sidecars
      signal(first.os_pid, "KILL")

      assert await(fn ->
               Enum.any?(
                 StarweaveImage.status(instance: instance).sidecars,
                 &(&1.generation == 2)
               )
             end)

      assert alive?(second.os_pid)
      for id <- [a, b], do: :ok = StarweaveImage.cancel(id, instance: instance)
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
      assert :ok = StarweaveImage.load_model("starweave/tiny", instance: instance)
    end
  end

  defp submit(instance, prompt) do
    {:ok, id} = StarweaveImage.submit(prompt, instance: instance)
    id
  end

  defp running(instance),
    do: for(s <- StarweaveImage.status(instance: instance).sidecars, r <- s.requests, do: r.id)

  describe "the queue" do
    test "that crashes takes its sidecars with it; its callers are told, and the next one works" do
      instance = start_ready("honest")
      pid = os_pid(instance)

      caller =
        Task.async(fn -> StarweaveImage.generate("hold", id: "lost", instance: instance) end)

      await_running(instance, "lost")

      Process.exit(Process.whereis(instance), :kill)
      assert {:error, %Error{kind: :unavailable}} = Task.await(caller)
      assert await(fn -> not alive?(pid) end)
      assert await(fn -> Process.whereis(instance) != nil end)
      await_state(instance, :ready)
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
    end
  end

  describe "enabled: false" do
    test "starts nothing and says so" do
      instance = start("honest", enabled: false)

      assert %{state: :disabled, error: nil, sidecars: []} =
               StarweaveImage.status(instance: instance)

      refute StarweaveImage.available?(instance: instance)
      assert StarweaveImage.models(instance: instance) == []

      for answer <- [
            StarweaveImage.generate("a fig", instance: instance),
            StarweaveImage.submit("a fig", instance: instance),
            StarweaveImage.load_model("starweave/tiny", instance: instance)
          ],
          do: assert({:error, %Error{kind: :disabled, retryable?: false}} = answer)

      assert [{:error, %Error{kind: :disabled}}] =
               "a fig" |> StarweaveImage.stream(instance: instance) |> Enum.to_list()
    end
  end

  describe "options" do
    test "that are wrong raise where the instance is started, and say what would be right" do
      for {opts, message} <- [
            {[sidecars: 0], ~r/sidecars must be/},
            {[modles: []], ~r/unknown option :modles, did you mean :models\?/},
            {[models: [:tiny]], ~r/models must be a list of at most 1024 model ids/},
            {[models: [{"a/b", path: <<0xFF, ?x>>}]],
             ~r/models must be a list of at most 1024 model ids/},
            {[models: [{"a/b", path: ""}]], ~r/models must be a list of at most 1024 model ids/},
            {[models: [{"a/b", revision: "v1.0+fix"}]], ~r/revisions of A-Z a-z 0-9/},
            {[models: [{"a/b", path: nil}]], ~r/models must be/},
            {[models: [{"a/b", pth: "x"}]], ~r/models must be/},
            {[models: [{"a/b", sha256: %{"x" => "y"}}]], ~r/models must be/},
            {[models: [{"a/b", fallbacks: "tiny"}]], ~r/fallbacks: \[…\]/},
            {[models: [{"a/b", fallbacks: ["../x"]}]],
             ~r/models must be a list of at most 1024 model ids/},
            {[max_queue: 0], ~r/max_queue must be an integer from 1/},
            {[preload: [nil]], ~r/preload must be a list of at most 256 model names/},
            {[pinned: ["../x"]], ~r/pinned must be a list of at most 256 model names/},
            {[memory_budget: -1], ~r/memory_budget must be an integer of bytes from 0 to 2\^50/},
            {[sidecars: []], ~r/sidecars must be/},
            {[sidecars: [[vae: :none]]], ~r/sidecars must be/},
            {[rate_limit: {1, 0}], ~r/rate_limit must be {requests, milliseconds}/},
            {[device: "cuda:1000"], ~r/device must be one of auto, cpu, cuda, cuda:N, mps, xpu/},
            {[offload: :layers], ~r/offload must be one of auto, none, model, sequential/},
            {[attention: :tiled], ~r/attention must be one of auto, none, sliced/},
            {[vae: true], ~r/vae must be one of auto, none, tiled/},
            {[compile: true], ~r/compile must be one of none, blocks/},
            {[backend: :onnx], ~r/backend must be one of torch, openvino/},
            {[env: [:HOME]], ~r/env must be a list of names/}
          ] do
        assert_raise ArgumentError, message, fn -> StarweaveImage.start_link(opts) end
      end
    end

    test "of several instances do not mix" do
      [one, two] = for capacity <- [1, 2], do: start_ready("honest", capacity: capacity)
      assert %{capacity: 1} = sidecar(one)
      assert %{capacity: 2} = sidecar(two)
      signal(os_pid(one), "KILL")
      assert %{generation: 1, state: :ready} = sidecar(two)
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: two)
    end
  end
end
