defmodule StarweaveImage.Variables do
  @moduledoc "Variables of the system's environment, for the time of one test."

  import ExUnit.Callbacks, only: [on_exit: 2]

  @doc "Sets each to its value, or unsets it where that is nil; all are as before when the test is over."
  @spec put(%{String.t() => String.t() | nil}) :: :ok
  def put(variables) do
    before = System.get_env()
    Process.put(__MODULE__, before)
    on_exit(__MODULE__, fn -> put_all(before) end)

    for {name, value} <- variables do
      if value, do: System.put_env(name, value), else: System.delete_env(name)
    end

    :ok
  end

  @doc "As they were before `put/1`."
  @spec restore() :: :ok
  def restore, do: put_all(Process.get(__MODULE__))

  defp put_all(before) do
    for {name, _} <- System.get_env(), not is_map_key(before, name), do: System.delete_env(name)
    System.put_env(before)
  end
end
