defmodule StarweaveImage.KilledProcessesTest do
  # Every process of ours, in the place that it has in a host, ends in every way, and more often than a supervisor
  # allows by default. What must come of it: it is back, nobody else of the host is touched, and requests are answered.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance, only: [fake: 1]
  import StarweaveImage.TestOSProcess, only: [await: 1, await_gone: 2]

  alias StarweaveImage.{Client, Error, Image}

  @moduletag :tmp_dir
  @moduletag :capture_log

  # Whose end takes the queue, and what it holds in memory, along.
  @with_the_queue [:keeper, :supervisor, :queue, :journal, :host]

  # The host's own supervisor restarts these, and allows three in five seconds.
  @of_the_host [:keeper, :client_keeper, :host]

  setup %{tmp_dir: folder} do
    name = Module.concat(__MODULE__, "I#{System.unique_integer([:positive])}")

    instance =
      {StarweaveImage,
       name: name,
       python: fake("honest"),
       journal: Path.join(folder, "journal"),
       heartbeat_interval: 50,
       shutdown_grace: 200,
       max_attempts: 100,
       backoff_min: 20}

    client = {Client, name: Module.concat(name, "Client"), instance: name}

    images = %{
      id: :images,
      type: :supervisor,
      start:
        {Supervisor, :start_link,
         [
           [bystander(:before), instance, client, bystander(:after)],
           [strategy: :one_for_one, name: Module.concat(name, "Host")]
         ]}
    }

    application = start_supervised!({Supervisor, [bystander(:other), images]} |> application())
    :ok = StarweaveImage.await_ready(60_000, instance: name)
    {:ok, name: name, application: application}
  end

  defp application({Supervisor, children}) do
    %{
      id: :application,
      type: :supervisor,
      start: {Supervisor, :start_link, [children, [strategy: :one_for_one]]}
    }
  end

  defp bystander(id), do: Supervisor.child_spec({Agent, fn -> id end}, id: id)

  defp pid(name, :queue), do: Process.whereis(name)
  defp pid(name, :client_keeper), do: Process.whereis(Module.concat([name, "Client", "Keeper"]))
  defp pid(name, :sidecar), do: owner(name)
  defp pid(name, :sidecar_keeper), do: name |> pid(:sidecars) |> child()

  defp pid(name, :log_reader) do
    with owner when owner != nil <- owner(name), %{reader: reader} <- :sys.get_state(owner).log do
      reader
    end
  end

  defp pid(name, part),
    do: Process.whereis(Module.concat(name, part |> Atom.to_string() |> Macro.camelize()))

  defp owner(name), do: name |> pid(:sidecar_keeper) |> child()

  defp child(nil), do: nil

  defp child(supervisor) do
    [{_, pid, _, _}] = Supervisor.which_children(supervisor)
    if is_pid(pid), do: pid
  end

  # The process as it is now; it may end while it is looked for.
  defp find(name, part) do
    pid(name, part)
  catch
    :exit, _ -> nil
  end

  defp end_it(pid, :kill), do: Process.exit(pid, :kill)
  defp end_it(pid, {:signal, reason}), do: Process.exit(pid, reason)

  defp end_it(pid, {:ends, reason}) do
    :sys.terminate(pid, reason)
  catch
    :exit, _ -> :ok
  end

  # Waits until another one has its place.
  defp replaced(name, part, old) do
    assert await(fn -> find(name, part) not in [nil, old] end), "no #{part} came back"
    find(name, part)
  end

  defp bystanders(application, name) do
    for supervisor <- [application, pid(name, :host)],
        {id, pid, _, _} <- Supervisor.which_children(supervisor),
        id in [:before, :after, :other],
        into: %{},
        do: {id, pid}
  end

  defp assert_works(name) do
    assert await(fn -> StarweaveImage.await_ready(30_000, instance: name) == :ok end)
    assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: name)
    client = Module.concat(name, "Client")
    assert await(fn -> Process.whereis(client) != nil end)
    assert {:ok, _, _} = Client.generate_image("a fig", width: 64, height: 64, client: client)
  end

  # Held at the sidecar until somebody else is done.
  defp held(name) do
    task = Task.async(fn -> StarweaveImage.generate("hold", instance: name, timeout: 120_000) end)
    assert await(fn -> StarweaveImage.status(instance: name).queue.running == 1 end)
    task
  end

  defp release(task, name) do
    running? = fn ->
      Enum.any?(StarweaveImage.status(instance: name).sidecars, &(&1.requests != [])) or
        not Process.alive?(task.pid)
    end

    assert await(running?)
    assert {:ok, %Image{}} = StarweaveImage.generate("release", instance: name)
    Task.await(task, 60_000)
  end

  for part <- [
        :keeper,
        :supervisor,
        :queue,
        :journal,
        :sidecars,
        :sidecar_keeper,
        :sidecar,
        :log_reader,
        :client,
        :client_keeper,
        :host
      ] do
    # The end of a reader costs the Python process, and a request that saw many such ends is tried alone.
    times =
      cond do
        part in @of_the_host -> 2
        part == :log_reader -> 1
        true -> 6
      end

    test "#{part}: it may be killed again and again", %{name: name, application: application} do
      task = held(name)
      others = bystanders(application, name)

      Enum.reduce(1..unquote(times), find(name, unquote(part)), fn _, pid ->
        end_it(pid, :kill)
        replaced(name, unquote(part), pid)
      end)

      assert_answered(task, name, unquote(part))
      assert_works(name)
      assert Process.alive?(application)
      # The host's image supervisor has begun anew, if that was killed.
      kept = if unquote(part == :host), do: [:other], else: [:before, :after, :other]
      assert Map.take(bystanders(application, name), kept) == Map.take(others, kept)
    end

    for reason <- [:normal, :shutdown, :a_fault] do
      if reason != :a_fault, do: @tag(:slow)

      test "#{part}: it may end as #{reason}, or be told to", %{
        name: name,
        application: application
      } do
        task = held(name)
        others = bystanders(application, name)
        pid = find(name, unquote(part))
        # Whoever traps exits takes it for news of a process that is no child.
        end_it(pid, {:signal, unquote(reason)})
        if find(name, unquote(part)) == pid, do: end_it(pid, {:ends, unquote(reason)})
        replaced(name, unquote(part), pid)
        assert_answered(task, name, unquote(part))
        assert_works(name)
        assert Process.alive?(application)
        kept = if unquote(part == :host), do: [:other], else: [:before, :after, :other]
        assert Map.take(bystanders(application, name), kept) == Map.take(others, kept)
      end
    end
  end

  defp assert_answered(task, name, part) when part in @with_the_queue do
    assert {:error, %Error{kind: :unavailable}} = Task.await(task, 60_000)
    assert await(fn -> StarweaveImage.await_ready(30_000, instance: name) == :ok end)
  end

  defp assert_answered(task, name, _part), do: assert({:ok, %Image{}} = release(task, name))

  test "all of them one after the other, and no Python process is left at the end", %{name: name} do
    os_pids =
      for part <- [:sidecar, :sidecar_keeper, :sidecars, :queue, :supervisor] do
        assert await(fn -> StarweaveImage.await_ready(30_000, instance: name) == :ok end)
        %{os_pid: os_pid} = hd(StarweaveImage.status(instance: name).sidecars)
        pid = find(name, part)
        end_it(pid, :kill)
        replaced(name, part, pid)
        os_pid
      end

    assert_works(name)
    stop_supervised!(:application)
    assert [] == await_gone(os_pids, 10_000)
  end

  test "nothing that users asked for is in the log of a crash", %{name: name} do
    log =
      ExUnit.CaptureLog.capture_log(fn ->
        for part <- [:sidecar, :sidecar_keeper, :log_reader, :journal, :queue, :keeper] do
          assert await(fn -> StarweaveImage.await_ready(30_000, instance: name) == :ok end)
          opts = [instance: name, id: "id-s3cret-#{part}", user_id: "s3cret", durable: true]
          assert {:ok, _} = StarweaveImage.submit("hold", opts)
          assert await(fn -> StarweaveImage.status(instance: name).queue.running > 0 end)
          pid = find(name, part)
          end_it(pid, {:ends, :a_fault})
          replaced(name, part, pid)
        end
      end)

    assert log =~ "State: \"(not shown: "
    # The line of each request that ends names it, by its id.
    crashes = log |> String.split("\n") |> Enum.reject(&(&1 =~ "image request "))
    for line <- crashes, do: refute(line =~ ~r/s3cret|%StarweaveImage\./)
  end

  test "an instance that a client started makes room for one that the host starts" do
    name = Module.concat(__MODULE__, "Late#{System.unique_integer([:positive])}")
    options = [python: fake("honest"), heartbeat_interval: 50]
    client = {Client, [name: Module.concat(name, "Client"), instance: name] ++ options}
    # In the order in which it does not belong.
    children = [client, {StarweaveImage, [name: name] ++ options}]
    {:ok, host} = Supervisor.start_link(children, strategy: :one_for_one)
    assert_works(name)

    assert {:error, {:already_started, _}} = StarweaveImage.start_link([name: name] ++ options)

    assert Enum.all?(Supervisor.which_children(host), fn {_, pid, _, _} -> Process.alive?(pid) end)

    Supervisor.stop(host)
  end
end
