defmodule StarweaveImage.TestInstance do
  @moduledoc """
  Instances over the fake sidecars of tests/support/fakes, for tests of one misbehaviour each.

      iex> "honest" |> StarweaveImage.TestInstance.fake() |> File.exists?()
      true
  """

  import ExUnit.Callbacks
  import ExUnit.Assertions

  alias StarweaveImage.{Image, TestOSProcess}

  @fakes Path.expand("fakes", __DIR__)

  @spec fake(String.t()) :: Path.t()
  def fake(name), do: Path.join(@fakes, name)

  @doc """
  Starts an instance under the test's supervisor; gives its name. With the name of a fake it waits
  until that is ready. When the test ends, nothing may be left of any Python process it had.
  """
  @spec start(String.t() | nil, keyword) :: atom
  def start(fake, opts \\ []) do
    name = Module.concat(__MODULE__, "I#{System.unique_integer([:positive])}")
    python = if fake, do: [python: fake(fake)], else: []

    # Short, since a fake has nothing to load; `heartbeat_timeout` still leaves room for a busy machine.
    quick = [name: name, heartbeat_interval: 50, heartbeat_timeout: 5_000, backoff_min: 20]

    start_supervised!({StarweaveImage, quick |> Keyword.merge(python) |> Keyword.merge(opts)},
      id: name
    )

    name
  end

  @spec start_ready(String.t(), keyword) :: atom
  def start_ready(fake, opts \\ []) do
    name = start(fake, opts)
    await_state(name, :ready)
    name
  end

  @spec await_state(atom, atom) :: map
  def await_state(name, state) do
    assert TestOSProcess.await(fn -> StarweaveImage.status(instance: name).state == state end),
           "not #{state} but #{inspect(StarweaveImage.status(instance: name))}"

    StarweaveImage.status(instance: name)
  end

  @doc "The one sidecar of the instance, as in its status; empty until it was heard of."
  @spec sidecar(atom) :: map
  def sidecar(name),
    do: [instance: name] |> StarweaveImage.status() |> Map.fetch!(:sidecars) |> List.first(%{})

  @spec os_pid(atom) :: pos_integer | nil
  def os_pid(name), do: sidecar(name)[:os_pid]

  @doc "The process that owns the port of the one sidecar."
  @spec owner(atom) :: pid
  def owner(name) do
    {_, supervisor, _, _} =
      name
      |> Module.concat("Supervisor")
      |> Supervisor.which_children()
      |> List.keyfind!(:sidecars, 0)

    [{_, keeper, _, _}] = Supervisor.which_children(supervisor)
    [{_, owner, _, _}] = Supervisor.which_children(keeper)
    owner
  end

  @doc "Submits a request and returns when the fake works on it."
  @spec submit_running(atom, String.t(), keyword) :: String.t()
  def submit_running(name, prompt, opts \\ []) do
    {:ok, id} = StarweaveImage.submit(prompt, [instance: name] ++ opts)
    await_running(name, id)
    id
  end

  @doc "Returns when a fake of the instance works on the request."
  @spec await_running(atom, String.t()) :: :ok
  def await_running(name, id) do
    running? = fn ->
      Enum.any?(StarweaveImage.status(instance: name).sidecars, fn sidecar ->
        Enum.any?(sidecar.requests, &(&1.id == id))
      end)
    end

    assert TestOSProcess.await(running?),
           "#{id} never ran: #{inspect(StarweaveImage.status(instance: name))}"

    :ok
  end

  @doc "The application goes on, with the same or with a new process."
  @spec assert_works(atom) :: term
  def assert_works(instance) do
    assert {:ok, %Image{data: "an apple, seed 5", attempts: 1}} =
             StarweaveImage.generate("an apple", seed: 5, instance: instance)
  end

  @doc "A request survives the death of the first process, which leaves nothing behind. Gives the attempts it took."
  @spec assert_replayed(String.t(), keyword) :: pos_integer
  def assert_replayed(fake, opts \\ []) do
    instance = start_ready(fake, opts)
    victim = os_pid(instance)

    assert {:ok, %Image{data: "a pear, seed 41", seed: 41, attempts: attempts}} =
             StarweaveImage.generate("a pear", seed: 41, instance: instance)

    assert [] == TestOSProcess.await_gone([victim], 5_000)
    assert %{generation: ^attempts, os_pid: survivor} = sidecar(instance)
    assert TestOSProcess.alive?(survivor) and survivor != victim
    assert_works(instance)
    attempts
  end

  @doc "The largest input image that a request may carry."
  @spec large_image() :: binary
  def large_image, do: <<137, "PNG", 13, 10, 26, 10>> <> :binary.copy("x", 12 * 1024 * 1024 - 8)

  @doc "What the fake saw so far."
  @spec report(atom) :: map
  def report(name) do
    {:ok, image} = StarweaveImage.generate("report", instance: name)
    image.parameters
  end

  @doc "An executable file with this content, in the test's own folder."
  @spec executable(Path.t(), String.t()) :: Path.t()
  def executable(folder, content) do
    path = Path.join(folder, "python")
    # An earlier one may be running just now, and cannot be written to.
    _ = File.rm(path)
    File.write!(path, content)
    File.chmod!(path, 0o755)
    path
  end

  @spec mailbox() :: [term]
  def mailbox, do: self() |> Process.info(:messages) |> elem(1)
end
