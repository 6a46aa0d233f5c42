defmodule StarweaveImage.AbsentInstanceTest do
  # What every function says where no instance of that name runs, or where it ends during the call.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance

  alias StarweaveImage.Error

  @calls [
    generate: quote(do: &StarweaveImage.generate("a fig", instance: &1)),
    generate_many: quote(do: &StarweaveImage.generate_many("a fig", 2, instance: &1)),
    submit: quote(do: &StarweaveImage.submit("a fig", instance: &1)),
    stream: quote(do: &(StarweaveImage.stream("a fig", instance: &1) |> Enum.to_list() |> hd())),
    await: quote(do: &StarweaveImage.await("a", 5_000, instance: &1)),
    await_many: quote(do: &StarweaveImage.await_many("a", 5_000, instance: &1)),
    subscribe: quote(do: &StarweaveImage.subscribe("a", instance: &1)),
    unsubscribe: quote(do: &StarweaveImage.unsubscribe("a", instance: &1)),
    cancel: quote(do: &StarweaveImage.cancel("a", instance: &1)),
    models: quote(do: &StarweaveImage.models(instance: &1)),
    load_model: quote(do: &StarweaveImage.load_model("a/b", instance: &1)),
    unload_model: quote(do: &StarweaveImage.unload_model("a/b", instance: &1)),
    await_ready: quote(do: &StarweaveImage.await_ready(5_000, instance: &1)),
    add_sidecar: quote(do: &StarweaveImage.add_sidecar(instance: &1)),
    drain_sidecar: quote(do: &StarweaveImage.drain_sidecar(1, instance: &1)),
    resume_sidecar: quote(do: &StarweaveImage.resume_sidecar(1, instance: &1)),
    remove_sidecar: quote(do: &StarweaveImage.remove_sidecar(1, instance: &1))
  ]

  for {name, call} <- @calls do
    test "#{name} says that no such instance runs" do
      absent = Module.concat(__MODULE__, Absent)

      assert {:error, %Error{kind: :unavailable, retryable?: true} = error} =
               unquote(call).(absent)

      assert error.message ==
               "image generation is not available: no instance named #{inspect(absent)} runs"

      assert mailbox() == []
    end

    test "#{name} says that the instance ended during the call" do
      # In its place stands a process that takes the call and ends.
      name = Module.concat(__MODULE__, "Dies#{unquote(name)}")
      {:ok, _} = Task.start(fn -> Process.register(self(), name) && end_at_a_call() end)
      assert StarweaveImage.TestOSProcess.await(fn -> Process.whereis(name) end)
      assert {:error, %Error{kind: :unavailable} = error} = unquote(call).(name)
      assert error.message =~ "the instance named #{inspect(name)} ended meanwhile"
      assert mailbox() == []
    end
  end

  test "status and available? tell it as a state" do
    absent = Module.concat(__MODULE__, Absent)
    assert %{state: :down, error: error, sidecars: []} = StarweaveImage.status(instance: absent)
    assert error =~ "no instance named #{inspect(absent)} runs"
    refute StarweaveImage.available?(instance: absent)
  end

  test "the sidecars may be gone while the queue still answers" do
    instance = start_ready("honest")
    :ok = Supervisor.terminate_child(Module.concat(instance, "Supervisor"), :sidecars)

    for call <- [&StarweaveImage.add_sidecar/1, &StarweaveImage.remove_sidecar(1, &1)] do
      assert {:error, %Error{kind: :unavailable}} = call.(instance: instance)
    end
  end

  defp end_at_a_call do
    receive do
      {:"$gen_call", _from, _request} -> exit(:killed_meanwhile)
    end
  end
end
