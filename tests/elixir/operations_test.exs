defmodule StarweaveImage.OperationsTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Error
  alias StarweaveImage.Queue.Operations

  defp added, do: Operations.add(Operations.new(), "load", %{t: :load_model}, :caller)
  defp gone, do: Error.new(:unavailable, "it is gone")

  test "an operation waits for the first sidecars at work, and is answered when all of them have answered" do
    assert {[], waiting} = Operations.begin(added(), [])
    refute Operations.busy?(waiting, 1)
    assert {[%{t: :load_model}], begun} = Operations.begin(waiting, [1, 2])
    # Who comes later has nothing to do with it.
    assert {[], ^begun} = Operations.begin(begun, [1, 2, 3])
    assert Operations.busy?(begun, 2) and not Operations.busy?(begun, 3)
    assert {[], begun} = Operations.done(begun, "load", 2, nil)
    assert {[{:caller, :ok}], done} = Operations.done(begun, "load", 1, nil)
    refute Operations.known?(done, "load")
  end

  test "the first error is the answer, also that of a sidecar that is gone" do
    {_, begun} = Operations.begin(added(), [1, 2, 3])
    error = Error.new(:model_not_found, "no such model")
    {[], begun} = Operations.done(begun, "load", 1, error)
    assert {[], begun} = Operations.lost(begun, 2, false, gone())
    # Another one's end is none of its concern.
    assert {[], ^begun} = Operations.lost(begun, 4, true, gone())
    assert {[{:caller, {:error, ^error}}], done} = Operations.lost(begun, 3, true, gone())
    assert done == Operations.new()
  end

  test "one that has not begun goes on waiting as long as a sidecar may come" do
    assert {[], waiting} = Operations.lost(added(), 1, false, gone())
    assert Operations.known?(waiting, "load")
    assert {[{:caller, {:error, error}}], _} = Operations.lost(waiting, 1, true, gone())
    assert error == gone()
  end
end
