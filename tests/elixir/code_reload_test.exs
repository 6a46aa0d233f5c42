defmodule StarweaveImage.CodeReloadTest do
  # Code that is loaded anew, twice and so with its old form purged, as happens all day in development: whoever waits in it
  # is ended. Not async: that would be the callers of other tests too.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [await: 1]

  alias StarweaveImage.{Image, Journal}

  @moduletag :tmp_dir

  defp reload_all do
    {:ok, modules} = :application.get_key(:starweave_image, :modules)
    ours = Enum.reject(modules, &(inspect(&1) =~ ~r/Test|Variables/))

    for _ <- 1..2, module <- ours do
      _ = :code.purge(module)
      {:module, ^module} = :code.load_file(module)
    end
  end

  defp processes(instance) do
    owner = owner(instance)

    names =
      for part <- ["Keeper", "Supervisor", "Sidecars"],
          do: Process.whereis(Module.concat(instance, part))

    [Process.whereis(instance), owner, :sys.get_state(owner).log.reader | names]
  end

  test "loses neither a request that runs nor one that waits, nor the log" do
    log =
      capture_log(fn ->
        instance = start_ready("prints", capacity: 1)
        os_pid = os_pid(instance)
        {:ok, held} = StarweaveImage.submit("hold", instance: instance)
        await_running(instance, held)
        {:ok, waiting} = StarweaveImage.submit("a fig", instance: instance)
        :ok = StarweaveImage.subscribe(waiting, instance: instance)
        before = processes(instance)

        reload_all()

        assert processes(instance) == before
        assert os_pid(instance) == os_pid
        assert :ok = StarweaveImage.cancel(held, instance: instance)
        assert_receive {:starweave_image, ^waiting, {:image, %Image{}}}, 20_000

        assert {:ok, %Image{attempts: 1}} =
                 StarweaveImage.await(waiting, 20_000, instance: instance)

        stop_supervised!(instance)
      end)

    # One for each request: the second was printed by new code's reader.
    assert length(Regex.scan(~r/image sidecar 1 \| stdout of Python/, log)) == 2
  end

  test "while a process starts, before it has connected to its log", %{tmp_dir: folder} do
    gate = Path.join(folder, "gate")

    python =
      executable(folder, """
      #!/bin/sh
      while [ ! -e '#{gate}' ]; do sleep 0.05; done
      exec '#{fake("prints")}' "$@"
      """)

    log =
      capture_log(fn ->
        instance = start(nil, python: python)
        assert await(fn -> os_pid(instance) != nil end)
        before = processes(instance)
        reload_all()
        assert processes(instance) == before
        File.write!(gate, "")
        await_state(instance, :ready)
        assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
        stop_supervised!(instance)
      end)

    assert log =~ "image sidecar 1 | stdout of Python"
  end

  test "nor the result of an earlier life that is just read from the disk", %{tmp_dir: folder} do
    journal = Path.join(folder, "journal")
    instance = start_ready("honest", journal: journal)
    {:ok, id} = StarweaveImage.submit("a fig", instance: instance, durable: true)
    assert {:ok, %Image{}} = StarweaveImage.await(id, 20_000, instance: instance)
    :ok = stop_supervised(instance)
    instance = start_ready("honest", journal: journal)

    # Who reads it waits for the journal meanwhile, in code of ours.
    :ok = :sys.suspend(Module.concat(instance, "Journal"))
    :ok = StarweaveImage.subscribe(id, instance: instance)

    readers = fn ->
      instance |> :sys.get_state() |> Map.fetch!(:results) |> Map.fetch!(:readers) |> Map.keys()
    end

    assert [reader] = readers.()
    monitor = Process.monitor(reader)

    waits? = fn ->
      Process.info(reader, :current_function) == {:current_function, {:gen, :do_call, 4}}
    end

    assert await(waits?)

    reload_all()

    assert_receive {:DOWN, ^monitor, _, _, :killed}, 10_000
    :ok = :sys.resume(Module.concat(instance, "Journal"))
    assert_receive {:starweave_image, ^id, {:image, %Image{}}}, 20_000
    assert Journal.recover(Module.concat(instance, "Journal")).damaged == 0
  end
end
