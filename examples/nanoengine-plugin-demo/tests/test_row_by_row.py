from nanoengine_plugin_demo.row_by_row import RowByRow

from nanoengine.testing.conformance import check_attention_backend


def test_it_is_attention():
    check_attention_backend(RowByRow)
